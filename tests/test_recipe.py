"""Recipes: written down exactly, run step by step, and taken up again where they were cut off."""

import inspect
import json
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import two_inputs
from torch import nn

from workbench import compress, data, models, training
from workbench.compress import recipe as room
from workbench.compress.recipe import (
    Distill,
    FineTune,
    PruneGradually,
    QuantizeAware,
    QuantizeStatic,
    QuantizeWeights,
    Recipe,
    Step,
)
from workbench.models import file_bytes

STEPS = sorted(Step.__subclasses__(), key=lambda step: step.__name__)
SGD = partial(torch.optim.SGD, lr=0.1)


def perceptron(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def quiet(recipe: Recipe, model: nn.Module, task: data.Task, **options) -> room.Run:
    return recipe.run(model, task, device="cpu", progress=False, **options)


# Steps


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_step_has_the_settings_of_its_technique(step):
    function = training.fit if step is FineTune else step.apply
    expected = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("model", "task", "calibration", "teacher", "device", "progress")
    }
    shown = inspect.signature(step).parameters
    assert {name: parameter.default for name, parameter in shown.items()} == expected
    assert step.__doc__.splitlines()[0] == inspect.getdoc(function).splitlines()[0]
    assert repr(step()) == f"{step.__name__}()"
    assert pickle.loads(pickle.dumps(step())) == step()
    assert Recipe.from_json(Recipe(step()).to_json()) == Recipe(step())


def test_every_technique_has_a_step():
    """All functions in the room's door that take a model and return one; these make no recipe:"""
    not_steps = {"correct_bias", "make_permanent", "rewind"}
    techniques = {
        function
        for name in set(compress.__all__) - not_steps
        if inspect.isfunction(function := getattr(compress, name))
        and next(iter(inspect.signature(function).parameters), "") == "model"
        and inspect.signature(function).return_annotation is nn.Module
    }
    assert techniques <= {step.apply for step in STEPS}
    assert {step.__name__ for step in STEPS} <= set(compress.__all__)


def test_a_step_does_what_its_technique_does(blobs):
    model = perceptron()
    expected = compress.quantize_weights(model, bits=3, granularity="tensor")
    assert same(QuantizeWeights(bits=3, granularity="tensor")(model, blobs), expected)
    expected = compress.quantize_static(model, blobs, samples=50, seed=3)
    assert same(QuantizeStatic(samples=50, seed=3)(model, blobs), expected)
    expected = compress.quantize_aware(model, blobs, bits=2, progress=False)
    assert same(QuantizeAware(bits=2)(model, blobs, progress=False), expected)


def test_fine_tuning_trains_a_copy(blobs):
    model = perceptron()
    expected = perceptron()
    training.fit(expected, blobs, epochs=2, optimizer=SGD, progress=False)
    tuned = FineTune(epochs=2, optimizer=SGD)(model, blobs, progress=False)
    assert same(tuned, expected)
    assert same(model, perceptron())
    assert compress.steps(tuned) == ("fine-tuned (2 epochs)",)
    assert compress.steps(FineTune()(tuned, blobs, progress=False))[1:] == ("fine-tuned (1 epoch)",)


def test_the_model_that_was_given_is_the_teacher(blobs):
    model = perceptron()
    run = quiet(Recipe(QuantizeWeights(bits=8), FineTune(), Distill(alpha=1.0)), model, blobs)
    before = quiet(Recipe(QuantizeWeights(bits=8), FineTune()), model, blobs).model
    expected = compress.distill(before, blobs, teacher=model, alpha=1.0, progress=False)
    assert same(run.model, expected)


def test_a_step_keeps_nothing_that_can_still_change():
    bits, skip = {"0": 4}, ["2"]
    step = QuantizeWeights(bits=bits, skip=skip)
    bits["0"] = 8
    skip.append("0")
    assert (step.bits, step.skip) == ({"0": 4}, ("2",))
    with pytest.raises(AttributeError):
        step.bits = 3


def test_equality_is_by_value():
    assert FineTune(optimizer=partial(torch.optim.SGD, lr=0.1)) == FineTune(optimizer=SGD)
    assert FineTune(optimizer=partial(torch.optim.SGD, lr=0.2)) != FineTune(optimizer=SGD)
    assert FineTune(augment=lambda x, g: x) != FineTune(augment=lambda x, g: x)
    assert QuantizeWeights(skip=["0"]) == QuantizeWeights(skip=("0",))
    assert QuantizeWeights() != QuantizeAware()
    steps = QuantizeWeights(bits={"0": 4}), FineTune(optimizer=SGD)
    assert len({Recipe(*steps), Recipe(*steps), Recipe(*steps[::-1])}) == 2


# The written form


def test_a_recipe_reads_as_a_list_and_evaluates_back():
    recipe = Recipe(
        QuantizeWeights(bits={"0": 4}),
        FineTune(epochs=3, optimizer=SGD, augment=data.flip_and_shift),
    )
    tuning = (
        "FineTune(epochs=3, optimizer=partial(torch.optim.SGD, lr=0.1), "
        "augment=workbench.data.flip_and_shift)"
    )
    assert str(recipe) == f"1. QuantizeWeights(bits={{'0': 4}})\n2. {tuning}"
    assert repr(recipe) == f"Recipe(\n    QuantizeWeights(bits={{'0': 4}}),\n    {tuning},\n)"
    names = vars(room) | {"partial": partial, "torch": torch}
    assert eval(repr(recipe), names) == recipe
    assert eval(repr(Recipe()), names) == Recipe()
    marked = Recipe(QuantizeWeights(skip=["<b>"]))._repr_html_()
    assert marked == "<ol><li><code>QuantizeWeights(skip=(&#x27;&lt;b&gt;&#x27;,))</code></li></ol>"
    assert repr(Distill(student=nn.Linear(1, 1))) == "Distill(student=<Linear>)"


@settings(max_examples=40)
@given(
    st.dictionaries(st.text(), st.integers()),
    st.floats(allow_nan=False),
    st.one_of(st.none(), st.floats(allow_nan=False)),
    st.lists(st.text()),
)
def test_json_gives_back_the_same_recipe(bits, rate, norm, skip):
    optimizer = partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.5))
    recipe = Recipe(
        QuantizeWeights(bits=bits, skip=skip),
        FineTune(optimizer=optimizer, gradient_norm=norm, augment=data.flip_and_shift),
    )
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.to_json() == recipe.to_json()
    assert again.steps[0].settings() == recipe.steps[0].settings()
    assert again.steps[1].optimizer.keywords == optimizer.keywords
    assert again.steps[1].optimizer.func is torch.optim.AdamW


def with_setting(name: str, value: object) -> str:
    written = json.loads(Recipe(FineTune()).to_json())
    written["steps"][0]["settings"][name] = value
    return json.dumps(written)


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "torch:load",
        "torch.optimize:SGD",
        "torch.optim.sgd:torch",  # only imported there
        "workbench.data:Path",
        "workbench.data:os.system",
        "workbench.models:_check",  # private
        "workbench.nothing:here",
        "workbenchmark:run",
        "workbench",
        "",
    ],
)
def test_json_calls_nothing_from_elsewhere(name):
    with pytest.raises(ValueError, match=f"'{name}' is refused: a recipe calls only"):
        Recipe.from_json(with_setting("optimizer", {"callable": name, "keywords": {}}))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Recipe(FineTune), TypeError, r"step 1 is .*FineTune.*; write FineTune\(\)"),
        (lambda: Recipe(FineTune(), 3), TypeError, "step 2 is 3, not a step"),
        (lambda: FineTune(epoch=3), TypeError, "'epoch'"),
        (lambda: QuantizeWeights(bits={3: 4}), TypeError, "QuantizeWeights.bits has the key 3"),
        (
            lambda: Recipe(FineTune(augment=lambda x, g: x)).to_json(),
            TypeError,
            "lambda.* cannot be written to JSON; use a number, text, or a callable that torch.opt",
        ),
        (
            lambda: Recipe(FineTune(optimizer=partial(torch.optim.SGD, [], lr=1))).to_json(),
            TypeError,
            "cannot be written",
        ),
        (lambda: Recipe(Distill(student=nn.Linear(1, 1))).to_json(), TypeError, "Linear.* cannot"),
        (lambda: Recipe.from_json('{"version": 2, "steps": []}'), ValueError, "version 1"),
        (lambda: Recipe.from_json("[]"), ValueError, "version 1"),
        (
            lambda: Recipe.from_json('{"version": 1, "steps": [{"step": "Melt"}]}'),
            ValueError,
            "no step is called 'Melt'; choose from .*'Binarize', .*'FineTune'",
        ),
        (
            lambda: Recipe.from_json(with_setting("heat", 3)),
            ValueError,
            r"FineTune has no setting \['heat'\]",
        ),
        (
            lambda: Recipe.from_json(with_setting("epochs", {"number": 3})),
            ValueError,
            "is no setting of a recipe",
        ),
    ],
)
def test_what_is_wrong_is_said(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Running


def test_each_step_is_recorded(blobs):
    model = perceptron()
    recipe = Recipe(FineTune(epochs=2), QuantizeWeights(bits=4))
    run = quiet(recipe, model, blobs)
    tuned = FineTune(epochs=2)(model, blobs, progress=False)
    small = compress.quantize_weights(tuned, bits=4)
    assert same(run.model, small)
    assert same(model, perceptron())
    assert compress.steps(run.model) == compress.steps(small)
    assert list(run.frame.columns) == ["step", "size_bytes", "score", "seconds", "resumed"]
    assert run.frame.step.tolist() == ["FineTune(epochs=2)", "QuantizeWeights()"]
    assert run.frame.size_bytes.tolist() == [file_bytes(tuned), file_bytes(small)]
    scores = [training.evaluate(m, blobs, split="validation").value for m in (tuned, small)]
    assert run.frame.score.tolist() == scores
    assert not run.frame.resumed.any()
    assert same(recipe(model, blobs, device="cpu", progress=False), run.model)


def test_an_empty_recipe_gives_a_copy(blobs, tmp_path):
    model = perceptron()
    run = quiet(Recipe(), model, blobs, folder=tmp_path)
    assert same(run.model, model)
    assert run.model is not model
    assert run.frame.empty


def test_a_recipe_fits_models_of_all_kinds():
    model, inputs = two_inputs()
    target = torch.arange(16) % 4
    task = data.task(*[(*inputs, target)] * 3)
    recipe = Recipe(
        compress.Prune(sparsity=0.5), FineTune(), QuantizeWeights(bits=4), QuantizeStatic()
    )
    run = quiet(recipe, model.bfloat16().float().train(), task)
    assert run.model(*inputs).shape == (16, 4)
    assert len(compress.steps(run.model)) == 4


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (QuantizeWeights(bits=9), "bits is 9"),
        (QuantizeWeights(bits={"nowhere": 4}), "nowhere"),
        (FineTune(epochs=0), "epochs is 0"),
        (QuantizeAware(granularity="row"), "granularity"),
    ],
)
def test_a_wrong_last_step_is_found_before_the_first_trains(blobs, last, message, monkeypatch):
    steps_taken = []
    take = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda *args: (steps_taken.append(1), take(*args))[1]
    )
    recipe = Recipe(FineTune(), last)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        quiet(recipe, perceptron(), blobs)
    assert caught.value.__notes__ == [f"in step 2 of the recipe, {last!r}"]
    assert not steps_taken
    quiet(Recipe(FineTune()), perceptron(), blobs)
    assert steps_taken  # the counter does count


@pytest.mark.parametrize("step", [FineTune(), QuantizeAware(), PruneGradually(), Distill()])
def test_an_interrupted_step_is_not_finished(blobs, step, tmp_path):
    class Interrupting(data.Split):
        def batches(self, *args, **options):
            if options.get("shuffle"):  # training, not its rehearsal
                raise KeyboardInterrupt
            return super().batches(*args, **options)

    task = data.Task("cut", Interrupting(blobs.train.source), blobs.validation, blobs.test)
    with pytest.raises(KeyboardInterrupt):
        quiet(Recipe(QuantizeWeights(bits=8), step), perceptron(), task, folder=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1
    # Outside a recipe, what was reached is kept as ever.
    history = training.fit(perceptron(), task, progress=False)
    assert history.interrupted


# Taking up again

TUNED = Recipe(FineTune(), QuantizeWeights(bits=4))


def finished(run: room.Run) -> list[bool]:
    return run.frame.resumed.tolist()


def test_finished_steps_are_taken_up(blobs, tmp_path):
    first = quiet(TUNED, perceptron(), blobs, folder=tmp_path)
    again = quiet(TUNED, perceptron(), blobs, folder=tmp_path)
    assert finished(first) == [False, False]
    assert finished(again) == [True, True]
    assert same(first.model, again.model)
    assert first.frame.drop(columns="resumed").equals(again.frame.drop(columns="resumed"))
    assert not list(tmp_path.glob("*.part"))
    longer = quiet(Recipe(*TUNED.steps, FineTune()), perceptron(), blobs, folder=tmp_path)
    assert finished(longer) == [True, True, False]


def frozen(model: nn.Module) -> nn.Module:
    model[0].weight.requires_grad_(False)
    return model


def tied(model: nn.Module) -> nn.Module:
    model = nn.Sequential(*model, nn.Linear(3, 3), nn.Linear(3, 3))
    model[4].weight = model[3].weight
    return model


def untied(model: nn.Module) -> nn.Module:
    model = tied(model)
    model[4].weight = nn.Parameter(model[4].weight.detach().clone())
    return model


@pytest.mark.parametrize(
    ("recipe", "change", "expected"),
    [
        (Recipe(FineTune(), QuantizeWeights(bits=3)), None, [True, False]),
        (Recipe(FineTune(seed=1), QuantizeWeights(bits=4)), None, [False, False]),
        (TUNED, lambda model: perceptron(1), [False, False]),
        (TUNED, lambda model: model.train(), [False, False]),
        (TUNED, frozen, [False, False]),
        (TUNED, lambda model: model.double(), [False, False]),
        (TUNED, lambda model: nn.Sequential(model[0], nn.GELU(), model[2]), [False, False]),
    ],
    ids=["last step", "first step", "weights", "mode", "frozen", "type", "structure"],
)
def test_what_changed_is_done_again(blobs, recipe, change, expected, tmp_path):
    quiet(TUNED, perceptron(), blobs, folder=tmp_path)
    model = change(perceptron()) if change else perceptron()
    if model[0].weight.dtype == torch.float64:
        blobs = data.task(*[tuple(t.double() if t.is_floating_point() else t
                                  for t in blobs.train.source.tensors)] * 3)  # fmt: skip
    assert finished(quiet(recipe, model, blobs, folder=tmp_path)) == expected


def test_another_task_or_a_tie_is_another_recipe(blobs, tmp_path):
    x, y = blobs.train.source.tensors
    recipe = Recipe(QuantizeWeights())
    quiet(recipe, perceptron(), blobs, folder=tmp_path)
    for other in (
        replace(blobs, train=blobs.train.subset(99)),
        replace(blobs, name="other"),
        data.task(lambda: [(x, y)], (x, y), (x, y)),
    ):
        assert finished(quiet(recipe, perceptron(), other, folder=tmp_path)) == [False]
    quiet(recipe, tied(perceptron()), blobs, folder=tmp_path)
    assert finished(quiet(recipe, untied(perceptron()), blobs, folder=tmp_path)) == [False]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "record", "no model", "other key"])
def test_a_damaged_step_is_done_again(blobs, damage, tmp_path):
    expected = quiet(TUNED, perceptron(), blobs, folder=tmp_path)
    quiet(Recipe(QuantizeWeights(bits=2)), perceptron(), blobs, folder=tmp_path / "other")
    last = max(tmp_path.glob("*.json"), key=lambda path: len(json.loads(path.read_text())["rows"]))
    stored = last.with_suffix(".pt")
    (foreign,) = (tmp_path / "other").glob("*.pt")
    if damage == "truncated":
        stored.write_bytes(stored.read_bytes()[:-100])
    elif damage == "foreign":
        stored.write_bytes(foreign.read_bytes())
    elif damage == "record":
        last.write_text(last.read_text()[:-20])
    elif damage == "no model":
        stored.unlink()
    else:
        stored.write_bytes(foreign.read_bytes())
        last.write_text(foreign.with_suffix(".json").read_text())
    with pytest.warns(UserWarning, match=f"{stored.name} is not used: .*; the step is done again"):
        run = quiet(TUNED, perceptron(), blobs, folder=tmp_path)
    assert finished(run) == [True, False]
    assert same(run.model, expected.model)
    assert finished(quiet(TUNED, perceptron(), blobs, folder=tmp_path)) == [True, True]


def test_a_folder_needs_settings_that_can_be_written(blobs, tmp_path):
    recipe = Recipe(FineTune(augment=lambda x, g: x))
    with pytest.raises(TypeError, match="cannot be written to JSON"):
        quiet(recipe, perceptron(), blobs, folder=tmp_path)
    quiet(recipe, perceptron(), blobs)  # without one they may be anything


KILLED = Recipe(FineTune(), QuantizeWeights(bits=8), FineTune(epochs=3), QuantizeWeights(bits=4))


class Waiting(torch.utils.data.TensorDataset):
    """Stops for good in the middle of the third step's training, and says that it did."""

    folder: Path | None = None
    batches_left = 7  # of 5 an epoch

    def __getitem__(self, index):
        if self.folder is not None and len(list(self.folder.glob("*.json"))) == 2:
            self.batches_left -= 1
            if self.batches_left == 0:
                (self.folder / "said").write_text("here")
                time.sleep(600)
        return super().__getitem__(index)


def waiting_task() -> data.Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 2, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    plain = data.Split(torch.utils.data.TensorDataset(x, y))
    return data.Task("waiting", data.Split(Waiting(x, y)), plain, plain)


def stop_halfway(folder: str) -> None:
    """Run by the test below in a process of its own."""
    task = waiting_task()
    task.train.source.folder = Path(folder)
    quiet(KILLED, perceptron(), task, folder=folder)


def test_a_killed_recipe_ends_as_if_it_had_not_been(tmp_path):
    code = f"import test_recipe; test_recipe.stop_halfway({str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    try:
        while not (tmp_path / "said").exists() and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    task = waiting_task()
    resumed = quiet(KILLED, perceptron(), task, folder=tmp_path)
    whole = quiet(KILLED, perceptron(), task)
    assert finished(resumed) == [True, True, False, False]
    assert same(resumed.model, whole.model)
    assert compress.steps(resumed.model) == compress.steps(whole.model)


def test_file_bytes_are_those_of_the_saved_file(tmp_path):
    models.save(perceptron(), tmp_path / "model.safetensors")
    assert file_bytes(perceptron()) == (tmp_path / "model.safetensors").stat().st_size
