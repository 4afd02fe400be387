import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from workbench import data, training

quiet = partial(training.fit, progress=False, device="cpu")
quick = partial(quiet, epochs=5, batch_size=20, optimizer=partial(torch.optim.Adam, lr=0.02))


def perceptron(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


def value(model: nn.Module, task: data.Task, split: str = "validation") -> float:
    return training.evaluate(model, task, split=split).value


# Fitting


def test_learns_what_can_be_learnt(blobs):
    model = perceptron()
    history = quick(model, blobs)
    loss = history.frame.training_loss
    assert loss.iloc[-1] < loss.iloc[0] / 2
    assert value(model, blobs, "test") > 0.95
    assert not history.interrupted


def test_plain_steps_are_those_of_the_formula(blobs):
    """Two steps of gradient descent: w - rate * gradient, each with a gradient of its own."""
    x, y = blobs.train.source.tensors
    task = data.task(train=lambda: [(x, y), (x, y)], validation=(x, y), test=(x, y))
    model = nn.Linear(2, 3)
    weight, bias = (p.detach().clone().requires_grad_() for p in (model.weight, model.bias))
    for _ in range(2):
        loss = nn.functional.cross_entropy(x @ weight.T + bias, y)
        gradients = torch.autograd.grad(loss, (weight, bias))
        weight, bias = (p - 0.5 * g for p, g in zip((weight, bias), gradients, strict=True))
    history = quiet(
        model, task, optimizer=partial(torch.optim.SGD, lr=0.5), schedule=ruin_after(10**6)
    )
    assert torch.allclose(model.weight, weight, atol=1e-6)
    assert torch.allclose(model.bias, bias, atol=1e-6)
    assert history.frame.training_loss[0] > loss.item()  # the mean over both steps


def test_same_seed_same_weights(blobs):
    def weights(seed: int) -> dict:
        model = perceptron()
        torch.seed()  # dropout must not follow the caller's random state
        quiet(model, blobs, epochs=2, batch_size=50, seed=seed)
        return model.state_dict()

    first = weights(1)
    assert same(first, weights(1))
    assert not same(first, weights(2))


def test_each_epoch_and_each_seed_has_its_own_order(blobs):
    first = []

    def augment(x, generator):
        first.append(tuple(x[0].tolist()))
        return x

    for seed in (0, 10):
        quiet(perceptron(), blobs, epochs=2, batch_size=360, augment=augment, seed=seed)
    assert len(set(first)) == 4


def test_leaves_the_callers_random_state(blobs):
    model = perceptron()
    state = torch.get_rng_state()
    quiet(model, blobs)
    assert torch.equal(torch.get_rng_state(), state)


def test_history_has_one_row_per_epoch(blobs):
    history = quiet(perceptron(), blobs, epochs=3)
    assert list(history.frame.columns) == [
        "epoch", "training_loss", "validation_accuracy", "seconds",
    ]  # fmt: skip
    assert history.frame.epoch.tolist() == [1, 2, 3]
    assert history.frame.seconds.is_monotonic_increasing


def ruin_after(step: int):
    """A schedule that ends good training with a step far too long."""
    return lambda optimizer, steps: LambdaLR(optimizer, lambda n: 1.0 if n < step else -10.0)


def test_weights_of_the_best_epoch_are_kept(blobs):
    model = perceptron()
    good_epochs, batches = 3, 8  # 360 examples to train on, 45 in a batch
    history = quiet(
        model, blobs, epochs=5, batch_size=45, schedule=ruin_after(good_epochs * batches),
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )  # fmt: skip
    scores = history.frame.set_index("epoch").validation_accuracy
    assert scores[5] < scores.max()
    assert history.best_epoch == scores.idxmax() <= good_epochs
    assert value(model, blobs) == scores.max()


def test_best_is_the_lowest_where_lower_is_better(blobs):
    def error(outputs, targets):
        return 1 - data.correct(outputs, targets)

    task = data.task(
        train=blobs.train.source.tensors,
        test=blobs.test.source.tensors,
        metric=data.Metric("error rate", error, higher_is_better=False),
    )
    history = quiet(perceptron(), task, epochs=4, batch_size=50)
    scores = history.frame.set_index("epoch").validation_error_rate
    assert history.best_epoch == scores.idxmin()
    assert scores.min() < scores.max()


class Interrupt(nn.Module):
    """Passes its input on, and raises KeyboardInterrupt in the given training batch."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch, self.seen = batch, 0

    def forward(self, x):
        self.seen += self.training
        if self.seen == self.batch:
            raise KeyboardInterrupt
        return x


def test_interrupting_keeps_the_best_weights_so_far(blobs):
    batches = 8
    whole, cut = perceptron(), nn.Sequential(*perceptron(), Interrupt(2 * batches + 3))
    constant = ruin_after(10**6)
    quiet(whole, blobs, epochs=2, batch_size=45, schedule=constant)
    history = quiet(cut, blobs, epochs=9, batch_size=45, schedule=constant)
    assert history.interrupted
    assert history.frame.epoch.tolist() == [1, 2]
    assert history.best_epoch in (1, 2)
    assert same(whole.state_dict(), cut.state_dict())  # not those of the third epoch


def test_interrupting_the_first_epoch_leaves_no_best(blobs):
    history = quiet(nn.Sequential(*perceptron(), Interrupt(2)), blobs, batch_size=45)
    assert history.interrupted
    assert history.best_epoch is None
    assert history.frame.empty


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adam],
    ids=lambda optimizer: optimizer.__name__,
)
def test_any_optimizer_and_schedule(blobs, optimizer):
    model = perceptron()
    quiet(
        model,
        blobs,
        epochs=3,
        batch_size=40,
        optimizer=partial(optimizer, lr=0.05),
        schedule=lambda optimizer, steps: StepLR(optimizer, steps // 2),
    )
    assert value(model, blobs) > 0.8


def test_one_cycle_rises_for_a_tenth_and_falls_to_nothing():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule = training.one_cycle(optimizer, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(0.4)
    assert rates.index(max(rates)) == 9
    assert rates[-1] < 1e-4


def test_frozen_parameters_stay(blobs):
    model = perceptron()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    quiet(model, blobs)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[3].weight, before["3.weight"])


def test_gradient_norm_limits_the_step(blobs):
    model = nn.Linear(2, 3)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    quiet(
        model, blobs, batch_size=len(blobs.train), gradient_norm=0.01,
        optimizer=partial(torch.optim.SGD, lr=1.0), schedule=ruin_after(10**6),
    )  # fmt: skip
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_augmentation_is_given_the_first_input(blobs):
    shapes = []

    def augment(x, generator):
        assert isinstance(generator, torch.Generator)
        shapes.append(tuple(x.shape))
        return x * 0

    model = nn.Linear(2, 3)
    before = model.weight.detach().clone()
    quiet(model, blobs, batch_size=180, augment=augment, optimizer=torch.optim.SGD)
    assert shapes == [(180, 2), (180, 2)]
    assert torch.equal(model.weight, before)  # inputs of zero give the weight no gradient


def test_sources_that_bring_their_own_batches(blobs):
    x, y = blobs.train.source.tensors

    def batches():
        yield from ((x[i : i + 60], y[i : i + 60]) for i in range(0, 360, 60))

    model = perceptron()
    task = data.task(train=batches, validation=batches, test=batches)
    history = quiet(model, task, epochs=10, optimizer=partial(torch.optim.Adam, lr=0.02))
    assert history.frame.training_loss.iloc[-1] < history.frame.training_loss.iloc[0] / 2


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2, 3)

    def forward(self, first, second):
        return self.out(torch.cat([first, second], 1))


def test_several_inputs(blobs):
    x, y = blobs.train.source.tensors
    mine = (x[:, :1], x[:, 1:], y)
    model = TwoInputs()
    quiet(model, data.task(train=mine, test=mine), epochs=10, batch_size=30)
    assert training.evaluate(model, data.task(train=mine, test=mine)).value > 0.5


def test_model_keeps_its_modes(blobs):
    model = perceptron().eval()
    model[2].train()
    quiet(model, blobs)
    assert [module.training for module in model] == [False, False, True, False]


def test_mixed_precision_runs_and_leaves_float32_weights(blobs):
    model = perceptron()
    quick(model, blobs, precision="mixed")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert value(model, blobs) > 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_cuda_trains_and_gives_the_model_back(blobs, precision):
    model = perceptron()
    quick(model, blobs, precision=precision, device="auto")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert value(model, blobs) > 0.9


@pytest.mark.parametrize("epochs", [0, -1])
def test_too_few_epochs(blobs, epochs):
    with pytest.raises(ValueError, match=f"epochs is {epochs}; give 1 or more"):
        quiet(perceptron(), blobs, epochs=epochs)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 3).requires_grad_(False)])
def test_nothing_to_train(blobs, model):
    with pytest.raises(ValueError, match="no parameter to train"):
        quiet(model, blobs)


def test_unknown_precision(blobs):
    with pytest.raises(ValueError, match="precision is 'int8'; choose 'float32' or 'mixed'"):
        quiet(perceptron(), blobs, precision="int8")


def test_nan_in_the_weights_is_named_as_a_cause(blobs):
    model = perceptron()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"loss of epoch 1 is nan; .* NaN in the data and the"):
        quiet(model, blobs)


def test_best_weights_survive_a_loss_that_explodes(blobs):
    model = perceptron()
    with pytest.raises(ValueError, match="the training loss of epoch 2 is"):
        quiet(
            model, blobs, epochs=2, batch_size=45, optimizer=partial(torch.optim.SGD, lr=0.1),
            schedule=lambda optimizer, steps: LambdaLR(optimizer, lambda n: 1.0 if n < 8 else 1e30),
        )  # fmt: skip
    assert value(model, blobs) > 0.8


# Evaluating


def test_evaluate_is_the_mean_over_the_split(blobs):
    model = perceptron().eval()
    x, y = blobs.test.source.tensors
    result = training.evaluate(model, blobs, batch_size=7)
    with torch.no_grad():
        output = model(x)
    assert torch.equal(result.scores, (output.argmax(-1) == y).float())
    assert result.value == pytest.approx((output.argmax(-1) == y).double().mean().item())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(output, y).item(), rel=1e-5)


def test_evaluate_takes_any_callable(blobs):
    assert training.evaluate(lambda x: torch.ones(len(x), 3), blobs).scores.shape == (200,)


def test_evaluate_uses_and_then_restores_the_mode(blobs):
    model = perceptron()  # in training mode: with dropout, two passes would differ
    first, second = (training.evaluate(model, blobs).loss for _ in range(2))
    assert first == second
    assert all(module.training for module in model.modules())


def test_modes_are_restored_after_an_error(blobs):
    model = perceptron()
    model[0].eval()

    def fail(x):
        assert not any(module.training for module in model.modules())
        raise KeyError

    model[1].forward = fail
    with pytest.raises(KeyError):
        training.evaluate(model, blobs)
    assert [module.training for module in model] == [False, True, True, True]
