import copy
import math
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import two_inputs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from workbench import compress, data, models, training
from workbench.compress.computed import MaskedWeight
from workbench.compress.distillation import divergence, relative_error
from workbench.compress.layers import replace_weights, summary

distill = partial(compress.distill, progress=False, device="cpu", batch_size=60)
SGD = partial(torch.optim.SGD, lr=0.1)


def perceptron(width: int = 16, seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, classes))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    """A network that answers as the clouds of `blobs` lie."""
    centres = torch.tensor([[0.0, 4.0], [4.0, 0.0], [-4.0, -4.0]])
    model = perceptron(seed=9)
    with torch.no_grad():
        model[0].weight.copy_(torch.cat([centres, -centres, torch.eye(10, 2)]))
        model[0].bias.zero_()
        model[3].weight.zero_()
        model[3].weight[:, :3] = torch.eye(3) / 5
    return model.eval()


def same(first: nn.Module, second: nn.Module) -> bool:
    second = second.state_dict()
    return all(torch.equal(value, second[key]) for key, value in first.state_dict().items())


def disagreement(student: nn.Module, teacher: nn.Module, task: data.Task) -> float:
    x, y = task.test.source.tensors
    with torch.no_grad():
        return divergence(copy.deepcopy(student).eval()(x), teacher(x), y, 1.0).item()


# The loss


def test_the_divergence_is_that_of_torch():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 5)
    p, q = (torch.distributions.Categorical(logits=x / 3) for x in (teacher, student))
    expected = 9 * torch.distributions.kl_divergence(p, q).mean()
    torch.testing.assert_close(divergence(student, teacher, torch.zeros(7).long(), 3.0), expected)


@given(st.integers(1, 6), st.integers(2, 8), st.integers(0, 99))
def test_for_high_temperatures_it_matches_centred_logits(batch, classes, seed):
    """Hinton et al. (2015), section 2.1: the gradient tends to (z - v) / classes."""
    torch.manual_seed(seed)
    teacher = torch.randn(batch, classes)
    student = torch.randn(batch, classes, requires_grad=True)
    divergence(student, teacher, torch.zeros(batch).long(), 1000.0).backward()
    difference = student.detach() - teacher
    expected = (difference - difference.mean(-1, keepdim=True)) / classes / batch
    torch.testing.assert_close(student.grad, expected, rtol=0.02, atol=2e-3)


@given(st.floats(0.1, 20), st.integers(0, 99))
def test_it_is_zero_for_equal_answers_only(temperature, seed):
    torch.manual_seed(seed)
    logits, none = torch.randn(4, 3), torch.zeros(4).long()
    # Logits that differ by a constant are equal answers.
    assert divergence(logits, logits + 5, none, temperature) == pytest.approx(0, abs=1e-3)
    assert divergence(logits, -logits, none, temperature) > 0


def test_ignored_positions_do_not_count():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 4, 5)
    target = torch.randint(0, 5, (2, 4))
    target[:, :2] = data.IGNORED
    expected = divergence(student[:, 2:], teacher[:, 2:], target[:, 2:], 2.0)
    assert torch.equal(divergence(student, teacher, target, 2.0), expected)


def test_targets_of_another_shape_all_count():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 5)
    soft_targets, hard = torch.full((4, 5), 0.2), torch.zeros(4).long()
    expected = divergence(student, teacher, hard, 2.0)
    assert torch.equal(divergence(student, teacher, soft_targets, 2.0), expected)


def test_half_precision_is_compared_in_float32():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 5).bfloat16()
    none = torch.zeros(4).long()
    loss = divergence(student, teacher, none, 2.0)
    assert torch.equal(loss, divergence(student.float(), teacher.float(), none, 2.0))


@given(st.floats(0.01, 100))
def test_the_error_of_a_hint_has_no_scale(scale):
    torch.manual_seed(0)
    own, hint = torch.randn(2, 6, 4)
    expected = F.mse_loss(own, hint) / hint.square().mean()
    torch.testing.assert_close(relative_error(own * scale, hint * scale), expected)
    assert relative_error(torch.zeros(6, 4), hint) == pytest.approx(1)
    assert relative_error(torch.zeros(6, 4), torch.zeros(6, 4)) == 0


# What is trained, and from what


def test_the_steps_are_those_of_the_formula(blobs, teacher):
    x, y = blobs.train.source.tensors
    task = data.task(train=lambda: [(x, y)] * 5, validation=(x, y), test=(x, y))
    student = nn.Linear(2, 3)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        expected = teacher(x)
    stepper = SGD(twin.parameters())
    schedule = training.one_cycle(stepper, 5)
    for _ in range(5):
        soft = F.kl_div((twin(x) / 2).log_softmax(-1), (expected / 2).softmax(-1), reduction="sum")
        loss = 0.3 * 4 * soft / len(x) + 0.7 * F.cross_entropy(twin(x), y)
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        schedule.step()
    got = distill(teacher, task, student=student, temperature=2, alpha=0.3, optimizer=SGD)
    assert not torch.allclose(got.weight, student.weight, atol=0.01)
    torch.testing.assert_close(got.weight, twin.weight)


@pytest.mark.parametrize("student", [None, perceptron(8, seed=2)], ids=["itself", "another"])
def test_without_a_share_of_the_teacher_it_is_plain_training(blobs, student):
    model = perceptron()
    plain = copy.deepcopy(model if student is None else student)
    keywords = {"epochs": 2, "batch_size": 60, "seed": 4, "optimizer": SGD}
    training.fit(plain, blobs, device="cpu", progress=False, **keywords)
    assert same(plain, distill(model, blobs, student=student, alpha=0, **keywords))


def test_the_student_comes_to_answer_as_the_teacher(blobs, teacher):
    start = perceptron(8, seed=1)
    got = distill(teacher, blobs, student=start, alpha=1, epochs=4, optimizer=SGD)
    assert disagreement(got, teacher, blobs) < disagreement(start, teacher, blobs) / 3


def test_labels_are_not_needed_with_the_whole_share(blobs, teacher):
    x, y = blobs.train.source.tensors
    wrong = data.task(train=(x, (y + 1) % 3), validation=(x, y), test=(x, y))
    got = distill(teacher, wrong, student=perceptron(8), alpha=1, epochs=4, optimizer=SGD)
    assert training.evaluate(got, blobs).value > 0.9


def test_a_reference_network_by_name_starts_from_its_seed():
    x, y = torch.rand(24, 1, 28, 28), torch.randint(0, 10, (24,))
    task = data.task((x, y), (x, y), (x, y))
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    model = compress.quantize_weights(model)  # a step that is not the student's
    still = partial(torch.optim.SGD, lr=0.0)
    got = distill(model, task, student="lenet-300-100", seed=5, optimizer=still)
    assert same(got, models.build("lenet-300-100", seed=5))
    assert not any(module.training for module in got.modules())
    assert compress.steps(got) == ("distilled (from Sequential, temperature 4)",)


def test_steps_are_those_of_the_student_and_one_more(blobs, teacher):
    rounded = compress.quantize_weights(teacher, bits=4)
    (step,) = compress.steps(rounded)
    distilled = "distilled (from Sequential, temperature 4)"
    assert compress.steps(distill(teacher, blobs, student=rounded)) == (step, distilled)
    assert compress.steps(distill(rounded, blobs, teacher=teacher)) == (step, distilled)
    assert compress.steps(distill(rounded, blobs, student=teacher)) == (distilled,)


def test_a_pruned_model_recovers_and_stays_pruned(blobs, teacher):
    pruned = copy.deepcopy(teacher)
    keep = torch.ones(16, 2, dtype=torch.bool)
    keep[0], keep[2, 0] = False, False
    replace_weights(
        {"0": pruned[0]}, lambda place: MaskedWeight(place.dense + 0.01 * (place.dense == 0), keep)
    )
    got = distill(pruned, blobs, teacher=teacher, alpha=1, epochs=3, optimizer=SGD)
    assert torch.equal(got[0].weight != 0, keep)
    assert disagreement(got, teacher, blobs) < disagreement(pruned, teacher, blobs) / 2


def test_rounded_weights_stay_and_the_rest_is_trained(blobs, teacher):
    rounded = compress.quantize_weights(teacher, bits=2, skip=["3"])
    rounded[0].bias.requires_grad_(False)
    got = distill(rounded, blobs, teacher=teacher, optimizer=SGD)
    assert torch.equal(got[0].weight, rounded[0].weight)
    assert not torch.equal(got[3].weight, rounded[3].weight)
    assert [p.requires_grad for p in got.parameters()] == [
        p.requires_grad for p in rounded.parameters()
    ]
    reasons = compress.coverage(got).set_index("layer").reason
    assert reasons.to_dict() == {"0": "frozen: nothing in it is trained", "3": ""}
    assert summary(got).startswith("1 of 2 layers distilled")


def test_tied_weights_stay_tied():
    model, inputs = two_inputs()
    target = torch.randint(0, 4, (16,))
    task = data.task((*inputs, target), (*inputs, target), (*inputs, target))
    got = distill(model, task)
    assert got.first.weight is got.second.weight


def test_sequences_with_ignored_targets():
    codes = torch.randint(0, 6, (40, 8))
    target = codes.roll(-1, 1)
    target[:, :4] = data.IGNORED
    split = TensorDataset(codes, target)
    task = data.task(split, split, split, metric=data.BITS_PER_CHARACTER)
    small, big = (models.CharTransformer(6, 8, width, 1, 1) for width in (8, 16))
    hints = {"blocks.0.mlp.0": "blocks.0.mlp.0", "blocks.0": "blocks.0"}
    got = distill(big, task, student=small, hints=hints)
    assert got(codes).shape == (40, 8, 6)
    assert not same(got, small)


def test_it_trains_in_bfloat16(teacher):
    x, y = torch.randn(60, 2).bfloat16(), torch.randint(0, 3, (60,))
    task = data.task((x, y), (x, y), (x, y))
    got = distill(teacher.bfloat16(), task, student=perceptron().bfloat16(), hints={"0": "0"})
    teacher.float()
    assert got[0].weight.dtype == torch.bfloat16


# The teacher


class Watched(nn.Module):
    """Passes batches on through a batch norm; counts calls in a list that copies share."""

    calls: ClassVar = []  # (training, gradient, examples)

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(2), nn.Linear(2, 3)

    def forward(self, x):
        self.calls.append((self.training, torch.is_grad_enabled(), len(x)))
        return self.out(self.norm(x))


@pytest.fixture
def watched() -> Watched:
    Watched.calls.clear()
    torch.manual_seed(0)
    return Watched().train()


def test_the_teacher_is_asked_once_for_each_batch(blobs, watched):
    distill(watched, blobs, student=nn.Linear(2, 3), epochs=2)
    one, *batches = Watched.calls
    assert one == (False, False, 1)  # does the answer fit?
    assert batches == [(False, False, 60)] * 12


def test_the_cached_teacher_is_asked_once_for_each_example(blobs, watched):
    distill(watched, blobs, student=nn.Linear(2, 3), epochs=3, cache=True)
    assert [examples for _, _, examples in Watched.calls] == [1] + [60] * 6


def test_the_teacher_is_left_as_it_was(blobs, watched):
    before = copy.deepcopy(watched.state_dict())
    distill(nn.Linear(2, 3), blobs, teacher=watched)
    torch.testing.assert_close(watched.state_dict(), before, rtol=0, atol=0)
    assert watched.training
    assert watched.norm.training
    assert all(p.grad is None for p in watched.parameters())


def test_cached_answers_are_the_same(blobs, teacher):
    keywords = {"student": perceptron(8), "epochs": 3, "optimizer": SGD}
    plain, cached = (distill(teacher, blobs, cache=cache, **keywords) for cache in (False, True))
    assert same(plain, cached)


def test_cached_answers_of_two_inputs():
    model, inputs = two_inputs()
    target = torch.randint(0, 4, (16,))
    task = data.task((*inputs, target), (*inputs, target), (*inputs, target))
    keywords = {"student": two_inputs(1)[0], "epochs": 2, "batch_size": 8}
    plain, cached = (distill(model, task, cache=cache, **keywords) for cache in (False, True))
    for (name, expected), got in zip(
        plain.state_dict().items(), cached.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(got, expected, msg=name)


def test_the_teacher_sees_the_augmented_inputs(blobs):
    seen = []

    class Noted(nn.Linear):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)

    distill(Noted(2, 3), blobs, student=nn.Linear(2, 3), augment=lambda x, _: x * 0 + 7)
    assert all(torch.equal(x, torch.full_like(x, 7)) for x in seen[1:])


# Hints


def test_hints_draw_the_activations_together(blobs, teacher):
    def unlike(model: nn.Module) -> float:
        x = blobs.test.source.tensors[0]
        with torch.no_grad():
            return relative_error(model[0](x), teacher[0](x)).item()

    start = perceptron(16, seed=1)
    fast = partial(torch.optim.Adam, lr=0.1)
    keywords = {"student": start, "alpha": 0.0, "batch_size": 5, "optimizer": fast}
    without = distill(teacher, blobs, **keywords)
    hinted = distill(teacher, blobs, hints={"0": "0"}, **keywords)
    assert unlike(hinted) < unlike(without) / 2
    slightly = distill(teacher, blobs, hints={"0": "0"}, hint_weight=1e-6, **keywords)
    assert unlike(slightly) > unlike(without) / 2


@pytest.mark.parametrize("width", [8, 16])
def test_nothing_of_the_hints_is_left(blobs, teacher, width):
    got = distill(teacher, blobs, student=perceptron(width), hints={"0": "0", "1": "0"})
    assert got.state_dict().keys() == perceptron(width).state_dict().keys()
    assert not any(module._forward_hooks for module in got.modules())


def test_the_regressors_are_trained(blobs, teacher):
    seen = []

    def optimizer(parameters):
        seen.extend(tuple(p.shape) for p in parameters)
        return SGD(parameters)

    distill(teacher, blobs, student=nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 3)),
            hints={"0": "0", "1": "3"}, optimizer=optimizer)  # fmt: skip
    assert seen == [(8, 2), (8,), (3, 8), (3,), (16, 8), (16,)]


def test_along_channels_a_regressor_is_a_1x1_convolution():
    from workbench.compress.distillation import _Regressor

    regressor, x = _Regressor(1, 4, 6), torch.randn(2, 4, 5, 3)
    expected = F.conv2d(x, regressor.map.weight[:, :, None, None], regressor.map.bias)
    torch.testing.assert_close(regressor(x), expected)


def test_hints_of_recurrent_layers(blobs):
    class Recurrent(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.lstm = nn.LSTM(2, width, batch_first=True)
            self.out = nn.Linear(width, 3)

        def forward(self, x):
            return self.out(self.lstm(x[:, None])[0][:, -1])

    got = distill(Recurrent(8), blobs, student=Recurrent(4), hints={"lstm": "lstm"})
    assert got(torch.zeros(1, 2)).shape == (1, 3)


# Interruption and random numbers


def test_hooks_are_removed_after_an_error(blobs, teacher):
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="epochs"):
        distill(teacher, blobs, student=model, hints={"0": "3"}, epochs=0)
    assert not model[0]._forward_hooks


def test_same_seed_same_student(blobs, teacher):
    start = perceptron(8)

    def trained(seed: int) -> nn.Module:
        torch.seed()  # neither dropout nor regressors follow the caller's random state
        return distill(teacher, blobs, student=start, hints={"0": "0"}, seed=seed)

    assert same(trained(1), trained(1))
    assert not same(trained(1), trained(2))


# Messages


def not_finite() -> nn.Module:
    model = nn.Linear(2, 3)
    model.register_forward_hook(lambda layer, inputs, output: output / 0)
    return model


class Late(nn.Linear):
    """Breaks on batches, and not on one example."""

    def forward(self, x):
        return super().forward(x) + (math.nan if len(x) > 1 else 0)


class Several(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "temperature is 0; give a number above 0"),
        ({"temperature": math.inf}, ValueError, "temperature is inf"),
        ({"temperature": math.nan}, ValueError, "temperature is nan"),
        ({"alpha": 1.1}, ValueError, "alpha is 1.1; give a share of the loss from 0 to 1"),
        ({"alpha": -0.1}, ValueError, "alpha is -0.1"),
        ({"hint_weight": 0}, ValueError, "hint_weight is 0; .* or no hints"),
        ({"cache": True, "augment": max}, ValueError, "cache keeps .* give one of them"),
        ({"cache": True, "hints": {"0": "0"}}, ValueError, "hints need .* give cache=False"),
        ({"student": "lenet"}, ValueError, "no reference network is called 'lenet'; choose"),
        ({"student": "resnet-8"}, ValueError, r"the student cannot take .* shapes \[\(1, 2\)\]"),
        ({"student": 3}, TypeError, "student is a int; give a torch.nn.Module or the name"),
        ({"teacher": "resnet-8"}, TypeError, "teacher is a str; give a torch.nn.Module"),
        ({"student": perceptron(), "teacher": perceptron()}, ValueError, "both given"),
        ({"student": nn.ReLU()}, ValueError, "ReLU has no layer with weights; nothing to distill"),
        ({"student": perceptron(classes=4)}, ValueError, r"shape \(1, 4\) and the teacher \(1, 3"),
        ({"student": nn.Linear(2, 1)}, ValueError, r"student's output has shape \(1, 1\)"),
        ({"student": Several(2, 3)}, TypeError, "the student returns a tuple; a tensor"),
        ({"teacher": not_finite()}, ValueError, "the teacher answers with NaN or infinity"),
        ({"teacher": Late(2, 3)}, ValueError, "the teacher answers with NaN or infinity"),
        ({"hints": {"fc": "0"}}, ValueError, r"hints name \['fc'\] in the student; .*'0', '1'"),
        ({"hints": {"0": "fc"}}, ValueError, r"hints name \['fc'\] in the teacher"),
        (
            {"student": nn.Sequential(nn.Unflatten(1, (2, 1)), nn.Flatten(), nn.Linear(2, 3)),
             "hints": {"0": "0"}},
            ValueError,
            r"hint 0 has shape \(1, 2, 1\) and 0 \(1, 16\); all dimensions but one",
        ),
        ({"epochs": 0}, ValueError, "epochs is 0"),
        ({"device": "cuda:9"}, (ValueError, RuntimeError), "cuda|CUDA"),
    ],
)  # fmt: skip
def test_messages(blobs, keywords, error, message):
    with pytest.raises(error, match=message):
        distill(perceptron(), blobs, **{"device": "cpu", **keywords})


def test_a_layer_that_never_runs_gives_no_hint(blobs):
    class Unused(nn.Linear):
        def __init__(self):
            super().__init__(2, 3)
            self.spare = nn.Linear(2, 3)

    with pytest.raises(ValueError, match="layer spare of the teacher gives no tensor"):
        distill(Unused(), blobs, student=nn.Sequential(nn.Linear(2, 3)), hints={"0": "spare"})


def test_cache_needs_tensors(blobs):
    loader = DataLoader(blobs.train.source, 10)
    task = data.task(loader, blobs.test.source, blobs.validation.source)
    with pytest.raises(ValueError, match="this one is a DataLoader; give cache=False"):
        distill(perceptron(), task, cache=True)
    assert distill(perceptron(), task)(torch.zeros(1, 2)).shape == (1, 3)


def test_a_model_with_nan_is_refused_by_name(blobs):
    model = perceptron()
    model[3].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"weight 3\.weight holds NaN"):
        distill(model, blobs)
