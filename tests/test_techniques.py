"""The contract of every technique: it returns a new model and leaves the old one as it was.

Techniques are found by their signature, so a new one is held to this without being named here.
"""

import copy
import importlib
import inspect
import pickle
import pkgutil
import warnings
from collections.abc import Callable

import networks
import pytest
import torch
from networks import TwoInputs, two_inputs
from torch import Tensor, nn

from workbench import compress, data, models
from workbench.data import Task

# Those that are no techniques; `correct_bias` mends what one made, and is given both models.
HELPERS = {"copy_of", "correct_bias", "record_step", "make_permanent", "rewind"}


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
    return {name: f for name, f in found.items() if name not in HELPERS}


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


AWKWARD = {
    "tied weights": networks.Tied,
    "a module used twice": networks.Twice,
    "grouped and transposed": networks.Transposed,
    "frozen parameters": networks.frozen,
    "bfloat16": networks.Bfloat16,
    "batch norm": networks.plain,
    "LSTM": networks.Recurrent,
    "MultiheadAttention": networks.Attending,
    "cannot be traced": networks.Branching,
}


def network_and_task(name: str) -> tuple[nn.Module, Task]:
    """A reference network or an awkward one, and a few examples that it takes."""
    generator = torch.Generator().manual_seed(0)

    def examples(*shape: int, codes: int = 0) -> Tensor:
        if codes:
            return torch.randint(0, codes, (24, *shape), generator=generator)
        return torch.rand(24, *shape, generator=generator)

    if name == "char-transformer":
        inputs, target = examples(16, codes=81), examples(16, codes=81)
    elif name in models.names():
        inputs, target = examples(1, 28, 28), examples(codes=10)
    else:
        shape = {"tied weights": (6,), "cannot be traced": (4,)}.get(name, (3, 8, 8))
        inputs = examples(*shape, codes=4 if name == "tied weights" else 0)
        target = examples(codes=4)
    torch.manual_seed(0)
    model = models.build(name) if name in models.names() else AWKWARD[name]()
    return model.eval(), data.task((inputs, target), (inputs, target), (inputs, target))


@pytest.mark.parametrize("network", [*models.names(), *AWKWARD])
@pytest.mark.parametrize("technique", sorted(techniques()))
def test_every_network_works_or_is_refused_by_name(technique, network):
    """What works has finite answers of the same shape, and says of each layer why it was left."""
    model, task = network_and_task(network)
    (inputs, *_), _ = next(iter(task.test.batches(24)))
    before = model(inputs)
    names = [name for name, _ in model.named_modules() if name]
    refusal = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "nothing quantized"
        try:
            small = apply(techniques()[technique], model, task)
        except (ValueError, TypeError) as error:
            refusal = str(error)
    if refusal:
        assert any(name in refusal for name in [type(model).__name__, *names]), refusal
        return
    after = small.eval()(inputs)
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    assert after.isfinite().all()
    table = compress.coverage(small)
    step = compress.steps(small)[-1]
    if ": nothing " in step:
        assert (table.reason != "").all()
        torch.testing.assert_close(after, before)
    else:
        assert not torch.equal(after, before), "the technique did nothing, and did not say so"
    assert torch.equal(model(inputs), before)


@pytest.mark.parametrize("technique", sorted(techniques()))
def test_what_torch_computes_before_each_call_is_refused_by_name(technique):
    model, task = network_and_task("batch norm")
    torch.nn.utils.prune.l1_unstructured(model[5], "weight", 0.5)
    with pytest.raises(ValueError, match=r"5 is pruned by torch.*prune\.remove first"):
        apply(techniques()[technique], model, task)
    model, task = network_and_task("batch norm")
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="0 has parametrizations; remove them first"):
        apply(techniques()[technique], model, task)
