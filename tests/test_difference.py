import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from workbench import data, explore, measure
from workbench.explore.differences import Difference


class Answers:
    """Gives prepared logits, whatever it is asked."""

    def __init__(self, logits: Tensor):
        self.logits = logits

    def __call__(self, x: Tensor) -> Tensor:
        return self.logits[x[..., 0].long()] if x.dim() > 1 else self.logits[x.long()]


def task_of(target: Tensor, labels: tuple[str, ...] = ()) -> data.Task:
    x = torch.arange(len(target))
    return data.task((x, target), (x, target), (x, target), labels=labels)


def one_hot(answers: list, classes: int = 3) -> Answers:
    return Answers(5 * nn.functional.one_hot(torch.tensor(answers), classes).float())


@pytest.fixture
def four() -> Difference:
    """Right twice, fixed, broken, wrong in another way."""
    task = task_of(torch.tensor([0, 0, 1, 1, 2]), ("cat", "dog", "owl"))
    return explore.difference(one_hot([0, 0, 0, 1, 0]), one_hot([0, 1, 1, 1, 1]), task)


def test_each_changed_answer_has_its_row_and_kind(four):
    assert four.flips.to_dict("list") == {
        "index": [1, 2, 4],
        "target": ["cat", "dog", "owl"],
        "before": ["cat", "cat", "cat"],
        "after": ["dog", "dog", "dog"],
        "kind": ["broken", "fixed", "other"],
    }


def test_agreement_has_wilsons_interval(four):
    assert (four.answers, four.agreement) == (5, 0.4)
    expected = measure.interval([1, 1, 0, 0, 0], proportion=True)
    assert (four.agreement_low, four.agreement_high) == expected


def test_each_class_has_its_share_of_right_answers(four):
    assert four.per_class.to_dict("list") == {
        "label": ["cat", "owl", "dog"],  # the greatest loss first
        "count": [2, 1, 2],
        "before": [1.0, 0.0, 0.5],
        "after": [0.5, 0.0, 1.0],
        "change": [-0.5, 0.0, 0.5],
    }


def test_it_shows_itself_in_words_and_as_a_table(four):
    assert repr(four) == (
        "40.00% of 5 answers are the same (95 % interval 11.76% to 76.93%); 3 changed: 1 fixed, "
        "1 broken, 1 other; mean KL divergence 2.94 nats"
    )
    html = four._repr_html_()
    assert repr(four) in html
    assert "-50.0%" in html


@given(st.integers(1, 30), st.integers(2, 5), st.integers(0, 999))
def test_it_agrees_with_a_count_by_hand(count, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    old, new = torch.randn(2, count, classes, generator=generator)
    target = torch.randint(0, classes, (count,), generator=generator)
    got = explore.difference(Answers(old), Answers(new), task_of(target))
    changed = [i for i in range(count) if old[i].argmax() != new[i].argmax()]
    assert got.flips["index"].tolist() == changed
    assert got.agreement == pytest.approx(1 - len(changed) / count)
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (old, new))
    assert got.kl_nats == pytest.approx(torch.distributions.kl_divergence(p, q).mean().item())
    weights = got.per_class["count"] / count
    right = (old.argmax(-1) == target).float().mean().item()
    assert (weights * got.per_class["before"]).sum() == pytest.approx(right)


def test_equal_models_do_not_differ():
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randint(0, 3, (20,))
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9)).train()
    got = explore.difference(model, model, data.task((x, y), (x, y), (x, y)))
    assert (got.agreement, got.kl_nats) == (1, 0)
    assert got.flips.empty
    assert list(got.flips) == ["index", "target", "before", "after", "kind"]
    assert model[1].training


def test_examples_are_numbered_across_batches():
    target = torch.zeros(1200).long()
    after = torch.zeros(1200).long()
    after[[3, 500, 1199]] = 1
    got = explore.difference(one_hot([0] * 1200), one_hot(after.tolist()), task_of(target))
    assert got.flips["index"].tolist() == [3, 500, 1199]


def test_sequences_are_compared_by_position():
    target = torch.tensor([[data.IGNORED, 1, 2], [data.IGNORED, 0, 0]])
    old, new = one_hot([[0, 1, 2], [0, 0, 1]]), one_hot([[1, 1, 0], [1, 0, 2]])
    got = explore.difference(old, new, task_of(target))
    assert (got.answers, got.agreement) == (4, 0.5)
    assert got.flips.to_dict("list") == {
        "index": [0, 1],
        "position": [2, 2],
        "target": [2, 0],
        "before": [2, 1],
        "after": [0, 2],
        "kind": ["broken", "other"],
    }
    assert got.per_class["count"].sum() == 4
    of_one_change = 5 * (math.exp(5) - 1) / (math.exp(5) + 2)
    assert got.kl_nats == pytest.approx(of_one_change / 2)


def test_classes_that_were_ruled_out_count_nothing():
    old, new = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.0, 1.0, -math.inf]])
    got = explore.difference(Answers(old), Answers(new), task_of(torch.tensor([0])))
    expected = 0.5 * math.log(0.5 / (1 / (1 + math.e))) + 0.5 * math.log(
        0.5 * (1 + math.e) / math.e
    )
    assert got.kl_nats == pytest.approx(expected)


def test_half_precision_and_one_example():
    old = torch.tensor([[0.0, 2.0]]).bfloat16()
    got = explore.difference(Answers(old), Answers(-old), task_of(torch.tensor([1])))
    assert got.kl_nats == pytest.approx(2 * math.tanh(1), rel=1e-3)
    assert got.flips["kind"].tolist() == ["broken"]


def test_gradients_go_on_after_an_error():
    def wrong(x):
        return torch.zeros(len(x), 9)

    with pytest.raises(ValueError, match="outputs have shape") as caught:
        explore.difference(one_hot([0]), wrong, task_of(torch.tensor([0])))
    assert torch.is_grad_enabled(), caught


@pytest.mark.parametrize(
    ("after", "target", "split", "message"),
    [
        ([[1.0, 0, 0]], [0], "tests", "split is 'tests'; choose"),
        ([[1.0, 0]], [0], "test", r"shape \(1, 3\) before and \(1, 2\) after"),
        ([[math.nan, 0, 0]], [0], "test", "the model after answers NaN"),
        ([[1.0, 0, 0]], [[0, 0]], "test", r"targets of shape \(1, 2\); give logits"),
        ([[1.0, 0, 0]], [data.IGNORED], "test", "gives no answers to compare"),
    ],
)
def test_messages(after, target, split, message):
    before, after = one_hot([0]), Answers(torch.tensor(after))
    with pytest.raises(ValueError, match=message):
        explore.difference(before, after, task_of(torch.tensor(target)), split=split)


@pytest.mark.parametrize(
    "first", ["", "import workbench.explore.differences", "import workbench.explore.diagnosis"]
)
def test_the_functions_are_found_whatever_was_imported_before(first):
    code = f"{first}\nfrom workbench import explore\nprint(explore.difference, explore.doctor)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.startswith("<function difference")
    assert "<function doctor" in shown.stdout
