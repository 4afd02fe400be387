"""Attacks on classifiers: closed forms on a linear model, the bound, and the table."""

import copy

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workbench import compress, data, training
from workbench.measure import robustness
from workbench.measure.robustness import fgsm, pgd, under_attack

ANYWHERE = (-100.0, 100.0)


def linear(classes: int = 2, features: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(features, classes)


def batch(count: int = 40, features: int = 5, classes: int = 2, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, features, generator=generator)
    return x, torch.randint(0, classes, (count,), generator=generator)


@pytest.fixture(scope="module")
def images() -> data.Task:
    """Bars in one of three places of an 8x8 image, with noise, pixels from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (900,), generator=generator)
    x = 0.3 * torch.rand(900, 1, 8, 8, generator=generator)
    for place in range(3):
        x[y == place, :, :, 2 * place + 1] += 0.4
    return data.task(train=(x[:600], y[:600]), test=(x[600:], y[600:]))


@pytest.fixture(scope="module")
def net(images) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(),
        nn.Linear(288, 3),
    )  # fmt: skip
    training.fit(model, images, epochs=8, progress=False)
    return model.eval()


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_two_classes_of_a_linear_model_have_a_closed_form(attack):
    """The loss rises with the other class's weights less those of the right one."""
    model, (x, y) = linear(), batch()
    difference = model.weight[1 - y] - model.weight[y]  # (B, features)
    expected = x + 0.1 * difference.sign()
    torch.testing.assert_close(
        attack(model, (x,), y, epsilon=0.1, bounds=ANYWHERE), expected.detach()
    )


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_accuracy_of_a_linear_model_under_attack_is_known_before(attack):
    """An example falls exactly if its margin is below epsilon times the L1 norm of the weights."""
    model, (x, _) = linear(), batch(200)
    y = model(x).argmax(1)
    difference = model.weight[y] - model.weight[1 - y]
    margin = (model(x).gather(1, y[:, None]) - model(x).gather(1, 1 - y[:, None])).squeeze(1)
    epsilon = (margin / difference.abs().sum(1)).median().item()
    survives = margin > epsilon * difference.abs().sum(1)
    changed = attack(model, (x,), y, epsilon=epsilon, bounds=ANYWHERE)
    right = model(changed).argmax(1) == y
    near = (margin - epsilon * difference.abs().sum(1)).abs() < 1e-5
    assert torch.equal(right[~near], survives[~near])
    assert 0.4 < right.float().mean() < 0.6


@settings(max_examples=40)
@given(
    st.sampled_from([fgsm, pgd]),
    st.floats(0, 0.5, width=32),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_nothing_leaves_the_ball_and_the_bounds(attack, epsilon, seed, dtype):
    model = nn.Sequential(linear(3), nn.ReLU(), linear(4, 3)).to(dtype)
    x, y = batch(6, classes=4, seed=seed)
    x = x.to(dtype)
    x[0], x[1] = 0, 1  # at the bounds
    changed = attack(model, (x,), y, epsilon=epsilon)
    assert changed.dtype == dtype
    assert (changed >= x - epsilon).all()
    assert (changed <= x + epsilon).all()
    assert (changed >= 0).all()
    assert (changed <= 1).all()


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_epsilon_zero_changes_nothing(attack, net):
    x, y = torch.rand(8, 1, 8, 8), torch.randint(0, 3, (8,))
    assert torch.equal(attack(net, (x,), y, epsilon=0.0), x)


def test_many_steps_are_never_weaker_than_one(net, images):
    x, y = images.test.source.tensors
    with torch.no_grad():
        for epsilon in (0.02, 0.1, 0.3):
            one = nn.functional.cross_entropy(
                net(fgsm(net, (x,), y, epsilon=epsilon)), y, reduction="none"
            )
            many = nn.functional.cross_entropy(
                net(pgd(net, (x,), y, epsilon=epsilon, steps=5)), y, reduction="none"
            )
            assert (many >= one - 1e-6).all()
            assert many.mean() > one.mean()


def test_the_start_is_random_but_repeats(net):
    """Where the gradient is zero, the start is all there is."""
    flat = nn.Sequential(nn.Flatten(), Staircase(), nn.Linear(64, 3))
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)

    def run(seed: int) -> torch.Tensor:
        return pgd(flat, (x,), y, epsilon=0.1, steps=1, seed=seed)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


class Staircase(nn.Module):
    """Rounds to steps of 0.05: the derivative is 0 everywhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 20).round() / 20


class Integers(nn.Module):
    """No gradient at all comes through."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot((x.flatten(1).sum(1) > 2).long(), 2).float()


@pytest.mark.parametrize("model", [Integers(), nn.Sequential(Staircase(), nn.Linear(5, 2))])
def test_a_model_without_gradients_leaves_one_step_where_it_was(model):
    x, y = batch()
    assert torch.equal(fgsm(model, (x,), y, epsilon=0.1), x)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_the_model_is_left_as_it_was(attack, net):
    model = copy.deepcopy(net).train()
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(8, 1, 8, 8)
    kept = x.clone()
    attack(model, (x,), torch.zeros(8, dtype=torch.long), epsilon=0.1)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(x, kept)
    assert not x.requires_grad


def test_it_works_inside_no_grad_and_with_other_inputs():
    class TwoInputs(nn.Module):
        def forward(self, x, scale):
            return torch.stack((x.sum(1) * scale, -x.sum(1)), 1)

    x, y = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        changed = fgsm(TwoInputs(), (x, torch.ones(3)), y, epsilon=0.25)
    assert torch.equal(changed, torch.full((3, 4), 0.25))


@pytest.mark.parametrize("attack", [fgsm, pgd])
@pytest.mark.parametrize(
    ("x", "settings_", "error", "message"),
    [
        (torch.zeros(1, 5, dtype=torch.long), {}, TypeError, "first input is torch.int64"),
        (torch.zeros(1, 5), {"epsilon": -0.1}, ValueError, "epsilon is -0.1; give 0 or more"),
        (torch.zeros(1, 5), {"epsilon": float("nan")}, ValueError, "epsilon is nan"),
        (torch.zeros(1, 5), {"bounds": (1, 0)}, ValueError, r"bounds are \(1, 0\)"),
        (torch.full((1, 5), -2.0), {}, ValueError, "inputs reach from -2 to -2, outside"),
    ],
)
def test_mistakes_are_named(attack, x, settings_, error, message):
    with pytest.raises(error, match=message):
        attack(linear(), (x,), torch.zeros(1, dtype=torch.long), **{"epsilon": 0.1} | settings_)


def test_steps_are_counted_from_one():
    x, y = batch()
    with pytest.raises(ValueError, match="steps is 0; give 1 or more"):
        pgd(linear(), (x,), y, epsilon=0.1, steps=0)


# The table


@pytest.fixture(scope="module")
def models(net, images) -> dict:
    with torch.no_grad():
        int8 = compress.quantize_static(net, images)
    return {
        "float32": net,
        "int8": int8,
        "pruned": compress.prune(net, sparsity=0.5),
        "elsewhere": lambda x: int8(x),
    }


@pytest.fixture(scope="module")
def table(images, models) -> pd.DataFrame:
    return under_attack(images, models, epsilons=(0.0, 0.05, 0.2), count=200, progress=False)


def test_without_a_change_it_is_the_plain_accuracy(images, models, table):
    drawn = images.test.subset(200, seed=0)
    inputs, target = next(iter(drawn.batches(200)))
    plain = table[table.epsilon == 0].set_index(["name", "against"]).score
    for name, model in models.items():
        with torch.no_grad():
            expected = (model(*inputs).argmax(1) == target).float().mean().item()
        assert plain[name, "float32"] == pytest.approx(expected)
    assert (table["count"] == 200).all()


def test_each_model_is_attacked_through_the_source_and_by_itself(table):
    pairs = {(row.name, row.against) for row in table.itertuples(index=False, name="Row")}
    assert pairs == {
        ("float32", "float32"), ("int8", "float32"), ("int8", "int8"), ("pruned", "float32"),
        ("pruned", "pruned"), ("elsewhere", "float32"),
    }  # fmt: skip
    assert len(table) == 3 * len(pairs)
    assert (table.score_low <= table.score).all()
    assert (table.score <= table.score_high).all()


def test_a_larger_change_fools_more(table):
    for _, rows in table[(table.against == "float32")].groupby("name"):
        assert rows.sort_values("epsilon").score.is_monotonic_decreasing
    fp32 = table[(table.name == "float32")].set_index("epsilon").score
    assert fp32[0.0] > 0.9
    assert fp32[0.2] < 0.3


def test_rounding_hides_the_gradient_but_not_the_weakness(table):
    """The attack on int8 itself looks harmless; the one that was made against float32 is not."""
    rows = table[table.epsilon == 0.2].set_index(["name", "against"])
    assert rows.no_gradient["float32", "float32"] == 0
    assert rows.no_gradient["int8", "int8"] == 1
    assert rows.score["int8", "float32"] < 0.5 < rows.score["int8", "int8"]
    assert rows.score["elsewhere", "float32"] == rows.score["int8", "float32"]
    assert pd.isna(rows.no_gradient["int8", "float32"])


def test_a_model_is_weakest_against_changes_made_for_it(table):
    rows = table[table.epsilon == 0.05].set_index(["name", "against"]).score
    assert rows["pruned", "pruned"] <= rows["pruned", "float32"]


def test_another_source_and_the_same_seed(images, models):
    chosen = {name: models[name] for name in ("float32", "pruned")}
    settings_ = dict(epsilons=(0.05,), count=100, source="pruned", progress=False)
    first = under_attack(images, chosen, **settings_)
    pd.testing.assert_frame_equal(first, under_attack(images, chosen, **settings_))
    assert set(first.against[first.name == "float32"]) == {"pruned", "float32"}
    one = under_attack(images, chosen, attack="fgsm", **settings_)
    both = first.merge(one, on=["name", "against"], suffixes=("", "_fgsm"))
    own = both[both.name == both.against]
    assert (own.score <= own.score_fgsm).all()
    assert own.score.sum() < own.score_fgsm.sum()  # one step is not all that ten can do


@pytest.mark.parametrize(
    ("settings_", "error", "message"),
    [
        ({"attack": "cw"}, ValueError, r"attack is 'cw'; choose from \('fgsm', 'pgd'\)"),
        ({"source": "mlp"}, ValueError, r"source is 'mlp'; name one of the models: \['float32'"),
        ({"source": "elsewhere"}, TypeError, "'elsewhere' has no gradients; name a module"),
        ({"epsilons": (-1,)}, ValueError, "epsilon is -1"),
    ],
)
def test_mistakes_in_the_table(images, models, settings_, error, message):
    with pytest.raises(error, match=message):
        under_attack(images, models, count=10, progress=False, **settings_)


def test_no_models():
    with pytest.raises(ValueError, match="source is None; name one of the models"):
        under_attack(None, {})


def test_a_model_may_answer_in_half_precision():
    model, (x, y) = linear().to(torch.bfloat16), batch()
    changed = fgsm(model, (x.to(torch.bfloat16),), y, epsilon=0.125)
    assert changed.dtype == torch.bfloat16
    assert robustness._answer(model, changed, ()).dtype == torch.float32


# Membership


def labels_task(train: list[float], test: list[float]) -> data.Task:
    """Each input is the logit of its right class, which is class 0 of two."""
    parts = {}
    for name, logits in {"train": train, "test": test}.items():
        x = torch.tensor(logits)[:, None]
        parts[name] = (x, torch.zeros(len(logits), dtype=torch.long))
    return data.task(**parts, validation=parts["test"])


class AsGiven(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, torch.zeros_like(x)), 1)


def test_a_model_that_learnt_by_heart_gives_every_name_away():
    found = robustness.membership(AsGiven(), labels_task([5.0, 6, 7, 8] * 5, [1.0, 2, 3, 4] * 5))
    assert found["probabilities"] == 1
    assert found["label"] == 0.5  # all are right
    assert found["p_value"] < 1e-5


def test_the_area_counts_pairs():
    train, test = [3.0, 1.0, -1.0], [2.0, -2.0]
    found = robustness.membership(AsGiven(), labels_task(train, test))
    pairs = [(a, b) for a in train for b in test]
    assert found["probabilities"] == pytest.approx(sum(a > b for a, b in pairs) / len(pairs))
    ties = [((a > 0) > (b > 0)) + 0.5 * ((a > 0) == (b > 0)) for a, b in pairs]
    assert found["label"] == pytest.approx(sum(ties) / len(ties))
    # With the class alone it is the gap between the accuracies.
    assert found["label"] == pytest.approx(0.5 + (2 / 3 - 1 / 2) / 2)


def test_a_model_that_learnt_nothing_gives_nothing_away():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(1500, generator=generator).tolist() for _ in range(2))
    found = robustness.membership(lambda x: AsGiven()(x), labels_task(train, test))
    assert found["probabilities"] == pytest.approx(0.5, abs=0.03)
    assert found["p_value"] > 0.01


def test_membership_draws_as_many_as_asked(blobs):
    seen = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x.new_zeros(len(x), 3)

    assert robustness.membership(model, blobs, count=50)["probabilities"] == 0.5
    assert seen == [50, 50]


def test_membership_is_of_classifiers(blobs):
    with pytest.raises(ValueError, match=r"the answer has shape \(360,\); give a model of"):
        robustness.membership(lambda x: x[:, 0], blobs)
