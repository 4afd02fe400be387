import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from workbench import data
from workbench.measure.agreement import agreement


def measured(models: dict, inputs: torch.Tensor, **settings):
    return agreement(models, inputs, progress=False, **settings).set_index("name")


class Table(nn.Module):
    """Answers input ``i`` with row ``i``."""

    def __init__(self, rows: torch.Tensor):
        super().__init__()
        self.rows = rows

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.rows[index]


def tables(examples: int = 30, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(examples, classes, generator=generator)
    after = before + 0.5 * torch.randn(examples, classes, generator=generator)
    return before, after


def test_a_model_agrees_with_itself():
    before, _ = tables()
    row = measured({"a": Table(before), "b": Table(before)}, torch.arange(30)).loc["b"]
    assert row.agreement == row.agreement_high == row.neighbours_kept == 1
    assert row.kl_bits == 0
    assert row.cosine == pytest.approx(1)


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_figures_are_those_of_numpy_and_scipy(seed, neighbours):
    before, after = tables(examples=12, seed=seed)
    models = {"before": Table(before), "after": Table(after)}
    row = measured(models, torch.arange(12), neighbours=neighbours, batch_size=5).loc["after"]
    p, q = (torch.softmax(x.double(), 1).numpy() for x in (before, after))
    assert row.kl_bits == pytest.approx(
        np.mean([stats.entropy(*pair, base=2) for pair in zip(p, q, strict=True)])
    )
    assert row.agreement == np.mean(p.argmax(1) == q.argmax(1))
    unit = [(x / x.norm(dim=1, keepdim=True)).double().numpy() for x in (before, after)]
    assert row.cosine == pytest.approx((unit[0] * unit[1]).sum(1).mean(), abs=1e-6)
    kept = []
    for i in range(12):
        others = [j for j in range(12) if j != i]
        near = [set(sorted(others, key=lambda j: -u[i] @ u[j])[:neighbours]) for u in unit]
        kept.append(len(near[0] & near[1]) / neighbours)
    assert row.neighbours_kept == pytest.approx(np.mean(kept))


def test_scale_moves_the_distribution_and_neither_answers_nor_neighbours():
    before, _ = tables()
    models = {"before": Table(before), "sharper": Table(3 * before)}
    row = measured(models, torch.arange(30)).loc["sharper"]
    assert row.agreement == row.neighbours_kept == 1
    assert row.cosine == pytest.approx(1)
    assert row.kl_bits > 0.1


def test_interval_is_wilsons():
    before = torch.eye(2)[torch.zeros(100, dtype=torch.long)]
    after = before.clone()
    after[:10] = torch.tensor([0.0, 1.0])
    row = measured({"before": Table(before), "after": Table(after)}, torch.arange(100)).loc["after"]
    assert row.agreement == 0.9
    assert (row.agreement_low, row.agreement_high) == pytest.approx((0.82563, 0.94478), abs=1e-4)


def test_vectors_have_no_answer():
    before, after = tables()
    models = {"before": Table(before), "after": Table(after)}
    row = measured(models, torch.arange(30), outputs="vectors").loc["after"]
    assert math.isnan(row.agreement)
    assert math.isnan(row.kl_bits)
    assert 0 < row.neighbours_kept < 1
    assert row.neighbours_kept_low < row.neighbours_kept < row.neighbours_kept_high


def test_baseline_can_be_named():
    before, after = tables()
    models = {"after": Table(after), "before": Table(before)}
    first = measured(models, torch.arange(30))
    named = measured(models, torch.arange(30), baseline="before")
    assert first.loc["after", "agreement"] == named.loc["before", "agreement"] == 1
    assert first.loc["before", "kl_bits"] != named.loc["after", "kl_bits"]  # not symmetric


def test_a_module_stays_in_training_mode_and_is_measured_in_evaluation_mode():
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9))
    assert measured({"a": net, "b": net}, torch.randn(20, 4)).loc["b", "agreement"] == 1
    assert net.training


def test_any_callable_and_several_inputs():
    def add(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
        return (x + y).numpy()

    x = torch.randn(20, 3)
    models = {"sum": add, "first": lambda x, y: x}
    row = measured(models, (x, torch.zeros_like(x))).loc["first"]
    assert row.agreement == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbours": 30}, "neighbours is 30, with 30 examples; give from 1 to 29"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"outputs": "text"}, "outputs is 'text'; choose 'logits' or 'vectors'"),
        ({"baseline": "none"}, "'none'"),
    ],
)
def test_impossible_settings(settings, message):
    before, _ = tables()
    with pytest.raises(ValueError, match=message):
        measured({"a": Table(before)}, torch.arange(30), **settings)


def test_models_of_other_tasks_and_broken_ones_are_refused():
    before, _ = tables()
    wide = Table(torch.randn(30, 6))
    with pytest.raises(ValueError, match=r"'wide' answers with the shape \(30, 6\), 'a' with"):
        measured({"a": Table(before), "wide": wide}, torch.arange(30))
    with pytest.raises(ValueError, match="'b' answers with a NaN"):
        measured({"a": Table(before), "b": Table(before / 0 * 0)}, torch.arange(30))
    with pytest.raises(ValueError, match=r"'b' answers with the shape \(30,\)"):
        measured({"a": Table(before), "b": lambda i: i.float()}, torch.arange(30))


def test_unlabelled_task_scores_the_agreement():
    net, other = nn.Linear(4, 3), nn.Linear(4, 3)
    x, unseen = torch.randn(50, 4), torch.randn(40, 4)
    task = data.unlabelled(net, train=x, test=unseen)
    row = measured({"net": net, "other": other}, unseen).loc["other"]
    (inputs, targets), *_ = task.test.batches(100)
    assert data.correct(other(*inputs), targets).mean().item() == pytest.approx(row.agreement)
    assert task.metric.name == "agreement"
    assert (len(task.train), len(task.validation)) == (45, 5)
