"""What each layer bears, and the best use of a budget, against a search through every choice."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from networks import two_inputs
from torch import nn

from workbench import compress, data, training
from workbench.compress.planning import best_choice, layer_setting, plan, sensitivity
from workbench.compress.recipe import (
    FineTune,
    Prune,
    QuantizeAware,
    QuantizeWeights,
    Recipe,
    ShareWeights,
)
from workbench.models import file_bytes


def perceptron(width: int = 40) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
        ).eval()


@pytest.fixture
def trained(blobs) -> nn.Module:
    model = perceptron()
    training.fit(model, blobs, epochs=3, progress=False)
    return model


def table(model, task, technique=QuantizeWeights, levels=(1, 2, 4), **options) -> pd.DataFrame:
    return sensitivity(model, task, technique, levels, progress=False, **options)


# Sensitivity


def test_every_row_is_the_model_with_one_layer_compressed(trained, blobs):
    found = table(trained, blobs)
    assert list(zip(found.layer, found.level, strict=True)) == list(
        itertools.product(("0", "2", "4"), (1, 2, 4))
    )
    before = training.evaluate(trained, blobs, split="validation")
    for row in found.itertuples():
        small = compress.quantize_weights(trained, bits={row.layer: row.level})
        after = training.evaluate(small, blobs, split="validation")
        # The examples come in another order, which rounds the mean of the loss differently.
        assert row.score == pytest.approx(after.value)
        assert row.drop == pytest.approx(before.value - after.value)
        assert row.loss == pytest.approx(after.loss, rel=1e-5)
        assert row.loss_increase == pytest.approx(after.loss - before.loss, abs=1e-5)
        assert row.weights == trained.get_submodule(row.layer).weight.numel()
        assert row.dense_bytes - 4 * row.weights in range(40, 100)  # its entry in the header
        change = row.size_bytes - row.dense_bytes
        assert 0 <= row.model_bytes + change - file_bytes(small) < 32
        assert row.technique == QuantizeWeights()
    assert (found.model_bytes == file_bytes(trained)).all()


def test_a_lower_score_can_be_the_better_one(blobs):
    model = perceptron()
    error = data.Metric("error", lambda o, t: 1 - data.correct(o, t), higher_is_better=False)
    parts = blobs.train, blobs.validation, blobs.test
    accuracy, errors = table(model, blobs), table(model, data.Task("b", *parts, metric=error))
    assert (accuracy["drop"] != 0).any()
    assert np.allclose(errors["drop"], accuracy["drop"])
    assert np.allclose(errors.score, 1 - accuracy.score)


def test_the_examples_are_drawn_once_and_split_can_be_chosen(trained, blobs):
    few = table(trained, blobs, examples=7, seed=1)
    assert few.equals(table(trained, blobs, examples=7, seed=1))
    assert not few.equals(table(trained, blobs, examples=7, seed=2))
    assert np.allclose(few.score * 7, (few.score * 7).round(), atol=1e-9)
    assert table(trained, blobs, examples=None).score.equals(table(trained, blobs).score)
    assert not table(trained, blobs, split="train").loss.equals(table(trained, blobs).loss)
    callables = data.task(*[lambda: [blobs.train.source[:50]]] * 3)
    assert len(table(trained, callables, examples=None)) == 9


def test_threads_give_the_same_table(trained, blobs):
    with ThreadPoolExecutor(2) as executor:
        found = table(trained, blobs, executor=executor)
    assert found.equals(table(trained, blobs))


def test_the_model_stays_as_it_was(trained, blobs):
    trained.train()
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    random = torch.get_rng_state()
    table(trained, blobs)
    assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())
    assert all(module.training for module in trained.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_tied_layers_are_one():
    model, inputs = two_inputs()
    target = torch.arange(16) % 4
    task = data.task(*[(*inputs, target)] * 3)
    found = table(model, task, levels=[8], layers=["second", "conv"]).set_index("layer")
    assert found.shared_with.to_dict() == {"conv": (), "first": ("second",)}
    both = compress.quantize_weights(model, bits={"first": 8, "second": 8})
    row = found.loc["first"]
    assert 0 <= row.model_bytes + row.size_bytes - row.dense_bytes - file_bytes(both) < 32
    budget = row.model_bytes + row.size_bytes - row.dense_bytes
    chosen = plan(found.loc[["first"]].reset_index(), size_bytes=budget)
    assert chosen.recipe == Recipe(QuantizeWeights(bits={"first": 8, "second": 8}))
    assert file_bytes(chosen.recipe(model, task, progress=False)) <= budget


def test_layers_that_the_technique_leaves_have_no_row(trained, blobs):
    template = ShareWeights(block=40)  # 40 inputs at a time: none fit the first layer
    with pytest.warns(UserWarning, match="nothing shared"):
        found = table(trained, blobs, template, [2])
    assert "0" not in set(found.layer)
    assert {"2", "4"} >= set(found.layer)


def test_other_techniques_and_settings(trained, blobs):
    found = table(trained, blobs, Prune(criterion="random", seed=3), [0.0, 0.9])
    assert found.technique.iloc[0] == Prune(criterion="random", seed=3)
    assert (found[found.level == 0]["drop"] == 0).all()
    small = compress.prune(trained, sparsity={"2": 0.9}, criterion="random", seed=3)
    score = training.evaluate(small, blobs, split="validation").value
    assert found.set_index(["layer", "level"]).score["2", 0.9] == pytest.approx(score)
    assert layer_setting(ShareWeights()) == "clusters"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"technique": QuantizeAware}, ValueError, "QuantizeAware has no setting that can be"),
        ({"technique": compress.Distill}, ValueError, "Distill has no setting"),
        ({"technique": FineTune}, ValueError, "FineTune has no setting"),
        ({"technique": compress.prune}, TypeError, "technique is <function prune"),
        ({"levels": []}, ValueError, r"levels is \[\]; give at least one value of bits"),
        ({"levels": [9]}, ValueError, "9"),
        ({"layers": ["9"]}, ValueError, r"layers names \['9'\]; layers are \['0', '2', '4'\]"),
        ({"layers": "0"}, TypeError, "layers is the string '0'"),
        ({"examples": 0}, ValueError, "examples is 0; give 1 or more, or None"),
        ({"split": "exam"}, ValueError, "split is 'exam'"),
    ],
)
def test_what_is_wrong_is_said(blobs, options, error, message):
    with pytest.raises(error, match=message):
        table(perceptron(), blobs, **options)


# The best choice

counts = st.integers(0, 12)
options = st.lists(st.tuples(counts, counts), min_size=1, max_size=4)


def brute_force(groups: list[list[tuple]], budget: float) -> tuple | None:
    """Least cost, and the least size that has it."""
    sums = (
        (sum(cost for _, cost in chosen), sum(size for size, _ in chosen))
        for chosen in itertools.product(*groups)
    )
    return min((sum_ for sum_ in sums if sum_[1] <= budget), default=None)


def as_arrays(groups: list[list[tuple]]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (np.array([s for s, _ in group], np.int64), np.array([c for _, c in group], float))
        for group in groups
    ]


@given(st.lists(options, min_size=1, max_size=5), st.integers(0, 60), st.integers(-9, 0))
@example([[(0, 0)]], 0, 0)
@example([[(1, 1), (1, 1)], [(2, 0), (1, 0)]], 3, 0)
def test_the_choice_is_the_best_of_all(groups, budget, shift):
    groups = [[(size + shift, cost) for size, cost in group] for group in groups]
    budget += shift * len(groups)
    best = brute_force(groups, budget)
    assume(best is not None)
    chosen = best_choice(as_arrays(groups), budget)
    taken = [group[index] for group, index in zip(groups, chosen, strict=True)]
    assert (sum(cost for _, cost in taken), sum(size for size, _ in taken)) == best


@given(st.integers(0, 10_000))
def test_the_choice_is_the_best_for_costs_of_any_size(seed):
    random = np.random.default_rng(seed)
    groups = [
        [(int(s), float(c)) for s, c in zip(random.integers(-900, 0, 4), random.random(4) ** 9,
                                             strict=True)] + [(0, 0.0)]
        for _ in range(5)
    ]  # fmt: skip
    smallest = sum(min(size for size, _ in group) for group in groups)
    budget = int(random.integers(smallest, 1))
    groups[0][0] = (groups[0][0][0], math.inf)  # broken: never taken
    best = brute_force(groups, budget)
    assume(best is not None and math.isfinite(best[0]))
    chosen = best_choice(as_arrays(groups), budget)
    taken = [group[index] for group, index in zip(groups, chosen, strict=True)]
    assert sum(size for size, _ in taken) <= budget
    assert sum(cost for _, cost in taken) == pytest.approx(best[0], rel=1e-12)


def test_a_hundred_layers_are_solved_as_well():
    """Sixteen choices for each of a hundred layers: far beyond a search through all."""
    random = np.random.default_rng(0)
    groups = []
    for _ in range(100):
        weights = int(random.integers(1_000, 1_000_000))
        bits = np.arange(1, 17)
        groups.append((weights * bits // 8, random.lognormal(0, 2) * 4.0**-bits))
    budget = sum(sizes[3] for sizes, _ in groups)
    chosen = best_choice(groups, budget)
    size = sum(int(sizes[i]) for (sizes, _), i in zip(groups, chosen, strict=True))
    cost = sum(costs[i] for (_, costs), i in zip(groups, chosen, strict=True))
    assert budget * 0.999 < size <= budget
    # No price of size makes a cheaper sum: the lower bound of Lagrange, for many prices.
    bounds = [
        sum((costs + price * sizes).min() for sizes, costs in groups) - price * budget
        for price in np.geomspace(1e-12, 1e-3, 400)
    ]
    assert max(bounds) <= cost < max(bounds) * 1.02


# Plans


def test_a_plan_keeps_the_budget_and_says_what_it_took(trained, blobs):
    found = table(trained, blobs, levels=(1, 2, 3, 4, 8))
    dense_bytes = file_bytes(trained)
    for size in (0.25, 0.3, 0.5, 0.9):
        chosen = plan(found, size=size)
        small = chosen.recipe(trained, blobs, progress=False)
        assert file_bytes(small) <= chosen.predicted_bytes <= size * dense_bytes
        assert chosen.predicted_bytes - file_bytes(small) < 64
        assert chosen.table.layer.tolist() == ["0", "2", "4"]
        assert chosen.table["drop"].sum() == pytest.approx(chosen.predicted_drop)
        (step,) = chosen.recipe.steps
        assert chosen.table.dropna().set_index("layer").level.to_dict() == step.bits
        assert all(type(bits) is int for bits in step.bits.values())
        assert plan(found, size_bytes=int(size * dense_bytes)).recipe == chosen.recipe


@pytest.mark.parametrize("width", [8, 23, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_file_is_never_above_the_prediction(blobs, count, width):
    """However the header is padded, and however many digits its offsets lose."""
    inner = (nn.Linear(width, width) for _ in range(count))
    model = nn.Sequential(nn.Linear(2, width), *inner, nn.Linear(width, 3))
    found = table(model, blobs, levels=[1, 8], examples=1).assign(loss_increase=-1.0)
    layers = list(dict.fromkeys(found.layer))
    for chosen in (layers, layers[1:], layers[1:2], layers[-2:]):
        bits = dict.fromkeys(chosen, 1)
        part = found[found.layer.isin(chosen) & (found.level == 1)]
        predicted = found.model_bytes[0] + (part.size_bytes - part.dense_bytes).sum()
        real = file_bytes(compress.quantize_weights(model, bits=bits))
        assert 0 <= predicted - real < 16 * len(chosen) + 8


def test_plans_match_a_search_through_all(trained, blobs):
    found = table(trained, blobs, levels=(2, 3, 5))
    rows = [frame for _, frame in found.groupby("layer")]
    choices = [
        [*((r.size_bytes - r.dense_bytes, max(0, r.loss_increase)) for r in frame.itertuples()),
         (0, 0)] for frame in rows
    ]  # fmt: skip
    for size in np.linspace(0.2, 1, 9):
        best = brute_force(choices, size * file_bytes(trained) - file_bytes(trained))
        if best is None:
            with pytest.raises(ValueError, match="at the least"):
                plan(found, size=size)
            continue
        chosen = plan(found, size=size)
        assert chosen.table.loss_increase.clip(lower=0).sum() == pytest.approx(best[0])
        assert chosen.predicted_bytes == file_bytes(trained) + best[1]


def test_with_the_whole_budget_only_what_costs_nothing_is_compressed(trained, blobs):
    found = table(trained, blobs).assign(loss_increase=0.1)
    chosen = plan(found, size=1.0)
    assert chosen.recipe == Recipe()
    assert (chosen.predicted_drop, chosen.predicted_bytes) == (0, file_bytes(trained))
    assert chosen.table.technique.isna().all()
    # A gain is noise, and no reason to take the larger of two levels.
    harmless = plan(found.assign(loss_increase=-0.1 * found.level.astype(float)), size=1.0)
    assert set(harmless.table.level) == {1}


def test_techniques_can_be_mixed(trained, blobs):
    both = pd.concat(
        [
            table(trained, blobs, levels=[4], layers=["0", "2"]),
            table(trained, blobs, ShareWeights(iterations=9), [8], layers=["2", "4"]),
        ]
    )
    both["loss_increase"] = [0.0, 0.3, 0.1, 0.0]
    chosen = plan(both, size=0.3)
    assert chosen.recipe == Recipe(
        QuantizeWeights(bits={"0": 4}), ShareWeights(clusters={"2": 8, "4": 8}, iterations=9)
    )
    small = chosen.recipe(trained, blobs, progress=False)
    assert file_bytes(small) <= chosen.predicted_bytes


def test_a_level_that_breaks_the_model_is_never_taken(trained, blobs):
    found = table(trained, blobs, levels=[1, 8])
    found.loc[found.level == 1, "loss_increase"] = math.nan
    assert set(plan(found, size=0.5).table.level.dropna()) == {8}
    with pytest.raises(ValueError, match="at the least"):
        plan(found, size=0.15)


def test_the_smallest_share_is_said_and_can_be_met(trained, blobs):
    found = table(trained, blobs)
    with pytest.raises(ValueError, match="the budget is 76 bytes; the levels") as caught:
        plan(found, size_bytes=76)
    share = float(str(caught.value).split("a share of ")[1].split(",")[0])
    assert plan(found, size=share).predicted_bytes <= share * file_bytes(trained)
    with pytest.raises(ValueError, match="at the least"):
        plan(found, size=share - 2e-4)
    with pytest.raises(ValueError, match="at the least"):
        plan(found, size=math.nan)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t, {}, "give either size"),
        (lambda t: t, {"size": 0.5, "size_bytes": 100}, "give either size"),
        (lambda t: t.iloc[:0], {"size": 0.5}, "the table has no rows"),
        (
            lambda t: t.assign(model_bytes=range(len(t))),
            {"size": 0.5},
            r"models of \[.*\] bytes; give rows of one",
        ),
    ],
)
def test_a_wrong_plan_is_refused(blobs, change, options, message):
    found = table(perceptron(), blobs, levels=[4])
    with pytest.raises(ValueError, match=message):
        plan(change(found), **options)
