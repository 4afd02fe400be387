"""The contract of every technique: it returns a new model and leaves the old one as it was.

Techniques are found by their signature, so a new one is held to this without being named here.
"""

import copy
import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Callable

import pytest
import torch
from networks import TwoInputs, two_inputs
from torch import nn

from workbench import compress, data
from workbench.data import Task


def techniques() -> dict[str, Callable]:
    """Every public function in the room that takes a model first and returns a model."""
    found = {}
    for module in pkgutil.iter_modules(compress.__path__, "workbench.compress."):
        for name, function in vars(importlib.import_module(module.name)).items():
            if name.startswith("_") or not inspect.isfunction(function):
                continue
            parameters = list(inspect.signature(function).parameters.values())
            takes_model = parameters and parameters[0].name == "model"
            if takes_model and inspect.signature(function).return_annotation is nn.Module:
                found[name] = function
    return {name: f for name, f in found.items() if name not in {"copy_of", "record_step"}}


def apply(function: Callable, model: nn.Module, task: Task) -> nn.Module:
    """Call a technique with its defaults and, where it needs data, with the task."""
    extra = {"minimum_weights": 0, "progress": False}
    keywords = {}
    for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
        if name in ("task", "calibration"):
            keywords[name] = task
        elif name in extra:
            keywords[name] = extra[name]
        else:
            assert parameter.default is not parameter.empty, f"no default for {name}"
    return function(model, **keywords)


@pytest.fixture
def model_and_task() -> tuple[TwoInputs, Task]:
    model, inputs = two_inputs()
    target = torch.randint(0, 4, (16,), generator=torch.Generator().manual_seed(0))
    return model, data.task((*inputs, target), (*inputs, target), (*inputs, target))


def snapshot(model: nn.Module) -> dict:
    """Everything about a model that a technique must leave alone."""
    modules, parameters = list(model.modules()), list(model.parameters())
    return {
        "state": copy.deepcopy(model.state_dict()),
        "modes": [module.training for module in modules],
        "hooks": [dict(module._forward_hooks) for module in modules],
        "types": [type(module) for module in modules],
        "identities": [id(parameter) for parameter in parameters],
        "trainable": [parameter.requires_grad for parameter in parameters],
        "gradients": [parameter.grad for parameter in parameters],
        "devices": [parameter.device for parameter in parameters],
        "steps": compress.steps(model),
    }


def test_the_search_finds_the_known_techniques():
    known = {"quantize_static", "quantize_dynamic", "quantize_weights", "quantize_aware"}
    assert known <= set(techniques())
    assert set(techniques()) <= set(compress.__all__), "a technique is missing from the room's door"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(techniques()))
def test_the_model_passed_in_is_unchanged(name, training, model_and_task):
    model, task = model_and_task
    model.train(training)
    model.norm.train(not training)  # each module has a mode of its own
    for parameter in model.conv.parameters():
        parameter.requires_grad_(False)
    handle = model.conv.register_forward_hook(lambda module, inputs, output: None)
    before = snapshot(model)
    random = torch.get_rng_state()
    apply(techniques()[name], model, task)
    after = snapshot(model)
    handle.remove()
    torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
    assert after == before
    assert torch.equal(torch.get_rng_state(), random), "the global random state was used"


@pytest.mark.parametrize("name", sorted(techniques()))
def test_the_result_shares_nothing_runs_and_is_described(name, model_and_task):
    model, task = model_and_task
    small = apply(techniques()[name], model, task)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for tensor in [*small.parameters(), *small.buffers()]:
            tensor.fill_(1)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert small(*task.example_input).shape == (1, 4)
    assert len(compress.steps(small)) == 1


@pytest.mark.parametrize("name", sorted(techniques()))
def test_the_result_can_be_copied_and_pickled(name, model_and_task):
    model, task = model_and_task
    small = apply(techniques()[name], model, task).eval()
    expected = small(*task.example_input)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(*task.example_input), expected)
        assert compress.steps(twin) == compress.steps(small)
