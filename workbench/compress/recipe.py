"""Several techniques in a row, written down, run, and taken up again where they were cut off.

Each technique has a *step*: a frozen dataclass of its settings, made from the function's own
signature. A `Recipe` is a tuple of steps. It runs on any model and task, records size and score
after each step, and keeps finished steps in a folder, if it is given one.

>>> Recipe(QuantizeWeights(bits=3), FineTune(epochs=2))
Recipe(
    QuantizeWeights(bits=3),
    FineTune(epochs=2),
)
"""

import hashlib
import html
import importlib
import inspect
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import ClassVar

import pandas as pd
import torch
from torch import nn
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

import workbench
from workbench import models
from workbench.compress.computed import copy_of, record_step, steps
from workbench.compress.distillation import distill
from workbench.compress.equalization import equalize_layers
from workbench.compress.low_rank import factorize
from workbench.compress.pruning import clip_weights, prune, prune_gradually, prune_threshold
from workbench.compress.quantization import (
    binarize,
    quantize_dynamic,
    quantize_static,
    quantize_weights,
)
from workbench.compress.quantization_aware import quantize_aware
from workbench.compress.rounding import quantize_gptq
from workbench.compress.smoothing import smooth_activations
from workbench.compress.structured import prune_structured
from workbench.compress.weight_sharing import share_weights
from workbench.data import Split, Task, write_whole
from workbench.training import evaluate, fit, raising_interrupts

VERSION = 1  # of the JSON form
COLUMNS = ("step", "size_bytes", "score", "seconds", "resumed")
# What the recipe gives to every step; all else in a technique's signature is a setting.
_GIVEN = ("model", "task", "calibration", "teacher", "device", "progress")


@dataclass(frozen=True, repr=False, eq=False)
class Step:
    """One technique with its settings: ``step(model, task)`` returns a new model.

    Steps are equal when technique and settings are; a sequence is kept as a tuple, a mapping as a
    copy.
    """

    apply: ClassVar[Callable[..., nn.Module]]
    given: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        for name, value in self.settings().items():
            object.__setattr__(self, name, _own(value, f"{type(self).__name__}.{name}"))

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        teacher: nn.Module | None = None,
        device: str = "auto",
        progress: bool = True,
    ) -> nn.Module:
        offered = {"teacher": teacher, "device": device, "progress": progress}
        offered |= {"task": task, "calibration": task}
        given = {name: value for name, value in offered.items() if name in self.given}
        return self.apply(model, **given, **self.settings())

    def settings(self) -> dict[str, object]:
        """Every field with its value."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def __repr__(self) -> str:
        """Only what differs from the defaults."""
        changed = [
            f"{entry.name}={_text(value)}"
            for entry in fields(self)
            if _encode(value := getattr(self, entry.name)) != _encode(entry.default)
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        # In their written form: two partials of the same function are not equal by themselves.
        return _encode(self.settings()) == _encode(other.settings())

    def __hash__(self) -> int:
        return hash(type(self))


def _fine_tune(model: nn.Module, task: Task, **settings) -> nn.Module:
    work = copy_of(model)
    fit(work, task, **settings)
    epochs = settings["epochs"]
    return record_step(work, f"fine-tuned ({epochs} epoch{'s' if epochs != 1 else ''})", model)


def _step(function: Callable, name: str = "", apply: Callable | None = None) -> type[Step]:
    """The step of a technique: its name in CamelCase, a field for each setting."""
    name = name or "".join(word.capitalize() for word in function.__name__.split("_"))
    parameters = inspect.signature(function).parameters.values()
    return make_dataclass(
        name,
        [(p.name, p.annotation, field(default=p.default)) for p in parameters
         if p.name not in _GIVEN],
        bases=(Step,),
        namespace={
            "__module__": __name__,
            # Examples run where the function stands, not a second time here.
            "__doc__": inspect.getdoc(function).partition(">>>")[0],
            "apply": staticmethod(apply or function),
            "given": tuple(p.name for p in parameters if p.name in _GIVEN),
        },
        frozen=True, repr=False, eq=False, kw_only=True,
    )  # fmt: skip


Binarize = _step(binarize)
ClipWeights = _step(clip_weights)
Distill = _step(distill)
EqualizeLayers = _step(equalize_layers)
Factorize = _step(factorize)
FineTune = _step(fit, "FineTune", _fine_tune)
Prune = _step(prune)
PruneGradually = _step(prune_gradually)
PruneStructured = _step(prune_structured)
PruneThreshold = _step(prune_threshold)
QuantizeAware = _step(quantize_aware)
QuantizeDynamic = _step(quantize_dynamic)
QuantizeGptq = _step(quantize_gptq)
QuantizeStatic = _step(quantize_static)
QuantizeWeights = _step(quantize_weights)
ShareWeights = _step(share_weights)
SmoothActivations = _step(smooth_activations)


@dataclass(frozen=True)
class Run:
    """What a recipe made: the model, and one row for each step.

    Columns of ``frame``: step, size_bytes (of the saved file), score (on validation), seconds
    (of the step alone), resumed (whether it was found in the folder).
    """

    model: nn.Module
    frame: pd.DataFrame


@dataclass(frozen=True, init=False, repr=False)
class Recipe:
    """Techniques in the order in which they are applied: ``recipe(model, task)`` is a new model.

    >>> recipe = Recipe(QuantizeWeights(bits={"0": 2}), FineTune(epochs=3))
    >>> Recipe.from_json(recipe.to_json()) == recipe
    True
    >>> print(recipe)
    1. QuantizeWeights(bits={'0': 2})
    2. FineTune(epochs=3)
    """

    steps: tuple[Step, ...]

    def __init__(self, *steps: Step):
        for place, step in enumerate(steps, 1):
            if not isinstance(step, Step):
                fix = f"write {step.__name__}()" if isinstance(step, type) else "give steps only"
                raise TypeError(f"step {place} is {step!r}, not a step such as FineTune(); {fix}")
        object.__setattr__(self, "steps", steps)

    def __call__(self, model: nn.Module, task: Task, **options) -> nn.Module:
        """The model that `run` makes; the options are the same."""
        return self.run(model, task, **options).model

    def run(
        self,
        model: nn.Module,
        task: Task,
        *,
        folder: str | os.PathLike | None = None,
        device: str = "auto",
        progress: bool = True,
    ) -> Run:
        """Apply each step to what the one before it made.

        Where a step trains, all steps are first rehearsed without training, so that a wrong
        setting or layer name in the last step is found before hours were spent on the first.

        Args:
            model: also the teacher of the steps that distil.
            folder: finished steps are kept here, and a later run takes up after the last one that
                it shares with this one: the same steps so far on the same model and task (by
                name and sizes). Models are kept as pickles, which can run code when they are
                read: the folder must be your own.
            device: as in `workbench.training.fit`.

        Raises:
            KeyboardInterrupt: a step was interrupted; it is not recorded as finished.
            TypeError: with ``folder``, a setting that JSON cannot hold.

        And what the techniques raise, with a note of the step.
        """
        work, rows, done = copy_of(model), [], 0
        paths = []
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            paths = [Path(folder, f"{key}.pt") for key in self._keys(model, task)]
            home = device_of(model)
            for index, path in reversed(list(enumerate(paths, 1))):
                if found := _read(path, home):
                    (work, rows), done = found, index
                    rows = [row | {"resumed": True} for row in rows]
                    break
        self._rehearse(done, work, model, task, device)
        bar = tqdm(total=len(self.steps), initial=done, desc="recipe", disable=not progress)
        with bar, raising_interrupts():
            for index, step in enumerate(self.steps[done:], done):
                bar.set_postfix_str(type(step).__name__)
                start = time.perf_counter()
                with _named(index, step):
                    work = step(work, task, teacher=model, device=device, progress=progress)
                seconds = time.perf_counter() - start
                score = evaluate(work, task, split="validation", device=device_of(work)).value
                row = (repr(step), models.file_bytes(work), score, seconds, False)
                rows.append(dict(zip(COLUMNS, row, strict=True)))
                if paths:
                    _write(paths[index], work, rows)
                bar.update()
        return Run(work, pd.DataFrame(rows, columns=COLUMNS))

    def to_json(self) -> str:
        """The recipe as text, every setting written out.

        Raises:
            TypeError: a setting that is no number, text, mapping or sequence of them, or callable
                from torch.optim or workbench.
        """
        written = [
            {"step": type(step).__name__, "settings": _encode(step.settings())["mapping"]}
            for step in self.steps
        ]
        return json.dumps({"version": VERSION, "steps": written}, indent=1, default=_no_json)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The recipe that `to_json` wrote. No callable is looked up outside torch.optim and
        workbench.

        Raises:
            ValueError: another version, an unknown step, setting or callable.
        """
        written = json.loads(text)
        if not isinstance(written, dict) or written.get("version") != VERSION:
            raise ValueError(f"not a recipe of version {VERSION}; write it again with to_json")
        return cls(*map(_step_from, written["steps"]))

    def __str__(self) -> str:
        return "\n".join(f"{place}. {step!r}" for place, step in enumerate(self.steps, 1))

    def __repr__(self) -> str:
        lines = "".join(f"    {step!r},\n" for step in self.steps)
        return f"Recipe(\n{lines})" if lines else "Recipe()"

    def _repr_html_(self) -> str:
        items = "".join(f"<li><code>{html.escape(repr(step))}</code></li>" for step in self.steps)
        return f"<ol>{items}</ol>"

    def _keys(self, model: nn.Module, task: Task) -> Iterator[str]:
        """For each step, what its result depends on, as one hash."""
        digest = hashlib.sha256()
        sizes = [_length(split) for split in (task.train, task.validation, task.test)]
        versions = (workbench.__version__, torch.__version__)
        digest.update(repr((*versions, task.name, task.metric.name, sizes)).encode())
        _hash_model(digest, model)
        for step in self.steps:
            digest.update(Recipe(step).to_json().encode())
            yield digest.hexdigest()

    def _rehearse(
        self, done: int, work: nn.Module, teacher: nn.Module, task: Task, device: str
    ) -> None:
        rest = self.steps[done:]
        if len(rest) < 2 or not any(hasattr(step, "optimizer") for step in rest):
            return  # the step checks its settings itself, or nothing long comes before it
        few = _few_examples(task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for index, step in enumerate(rest, done):
                if hasattr(step, "optimizer"):
                    # `fit` checks all its arguments, makes the optimizer, and ends at once.
                    step = replace(step, optimizer=_interrupt)
                with _named(index, self.steps[index]):
                    work = step(work, few, teacher=teacher, device=device, progress=False)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is: on its first parameter's or buffer's device."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _own(value: object, name: str) -> object:
    """The value as a step keeps it: nothing that its giver could still change."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {key!r}; give names, as text")
        return {key: _own(entry, name) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_own(entry, name) for entry in value)
    return value


def _text(value: object) -> str:
    """A setting as Python that, a module apart, evaluates to it."""
    if isinstance(value, partial):
        given = [*map(_text, value.args), *(f"{k}={_text(v)}" for k, v in value.keywords.items())]
        return f"partial({', '.join([_text(value.func), *given])})"
    if isinstance(value, nn.Module):
        return f"<{type(value).__name__}>"
    if (name := _name_of(value)) is None:
        return repr(value)
    module, _, attribute = name.partition(":")
    public = getattr(torch.optim, attribute, None) is value
    return f"{'torch.optim' if public else module}.{attribute}"


def _encode(value: object) -> object:
    """A setting in the types of JSON; what has no place there stays as it is."""
    if isinstance(value, (list, tuple)):
        return [_encode(entry) for entry in value]
    if isinstance(value, dict):
        return {"mapping": {key: _encode(entry) for key, entry in value.items()}}
    if isinstance(value, partial) and not value.args and (name := _name_of(value.func)):
        return {"callable": name, "keywords": _encode(value.keywords)["mapping"]}
    name = _name_of(value)
    return value if name is None else {"callable": name}


def _decode(value: object) -> object:
    if isinstance(value, list):
        return tuple(_decode(entry) for entry in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"mapping"}:
        return {key: _decode(entry) for key, entry in value["mapping"].items()}
    if not {"callable"} <= value.keys() <= {"callable", "keywords"}:
        raise ValueError(f"{value} is no setting of a recipe; write it again with to_json")
    function = _find(value["callable"])
    if "keywords" not in value:
        return function
    return partial(function, **{key: _decode(v) for key, v in value["keywords"].items()})


def _name_of(value: object) -> str | None:
    """``module:name`` of a function or class that `_find` gives back, else None."""
    if not isinstance(value, (FunctionType, type)):
        return None
    name = f"{value.__module__}:{value.__qualname__}"
    try:
        return name if _find(name) is value else None
    except ValueError:
        return None


def _find(name: str) -> Callable:
    """The public function or class of that name, if torch.optim or workbench defines it."""
    module, _, attribute = name.partition(":")
    allowed = any(f"{module}.".startswith(f"{room}.") for room in ("torch.optim", "workbench"))
    found = None
    if allowed and attribute.isidentifier() and not attribute.startswith("_"):
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            found = None
    # Also not what a module there has only imported.
    if not isinstance(found, (FunctionType, type)) or found.__module__ != module:
        raise ValueError(
            f"{name!r} is refused: a recipe calls only what torch.optim or workbench defines"
        )
    return found


def _no_json(value: object) -> None:
    raise TypeError(
        f"{value!r} cannot be written to JSON; use a number, text, or a callable that torch.optim "
        "or workbench defines, where needed in a functools.partial with keywords"
    )


def _step_from(written: dict) -> Step:
    known = {step.__name__: step for step in Step.__subclasses__()}
    if written.get("step") not in known:
        raise ValueError(f"no step is called {written.get('step')!r}; choose from {sorted(known)}")
    step = known[written["step"]]
    unknown = sorted(set(written["settings"]) - {entry.name for entry in fields(step)})
    if unknown:
        raise ValueError(f"{step.__name__} has no setting {unknown}")
    return step(**{name: _decode(value) for name, value in written["settings"].items()})


@contextmanager
def _named(index: int, step: Step) -> Iterator[None]:
    """Add to an error from which step it came."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in step {index + 1} of the recipe, {step!r}")
        raise


def _interrupt(parameters: object) -> None:
    raise KeyboardInterrupt


def _few_examples(task: Task, count: int = 8) -> Task:
    """The task with the first examples of each split alone, whatever these are read from."""

    def first(split: Split) -> Split:
        inputs, target = next(iter(split.batches(count)))
        return Split(TensorDataset(*(x[:count] for x in inputs), target[:count]))

    return replace(
        task, train=first(task.train), validation=first(task.validation), test=first(task.test)
    )


def _length(split: Split) -> int | None:
    try:
        return len(split)
    except TypeError:  # a callable
        return None


def _hash_model(digest: "hashlib._Hash", model: nn.Module) -> None:
    """Everything about a model that a technique's result depends on."""
    trained = [(name, p.requires_grad) for name, p in model.named_parameters()]  # and what is tied
    modes = [module.training for module in model.modules()]
    digest.update(repr((model, steps(model), trained, modes)).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if torch.is_tensor(value):
            digest.update(repr((value.dtype, value.shape)).encode())
            raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(raw.numpy())
        else:  # a module's extra state
            digest.update(repr(value).encode())


def _write(path: Path, model: nn.Module, rows: list[dict]) -> None:
    """The model, then the record that makes it count."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    content = buffer.getvalue()
    record = {"key": path.stem, "sha256": hashlib.sha256(content).hexdigest(), "rows": rows}
    write_whole(path, lambda temporary: Path(temporary).write_bytes(content))
    text = json.dumps(record, indent=1)
    write_whole(path.with_suffix(".json"), lambda temporary: Path(temporary).write_text(text))


def _read(path: Path, device: torch.device) -> tuple[nn.Module, list[dict]] | None:
    """What `_write` wrote, or None where it is missing or, with a warning, damaged."""
    if not path.with_suffix(".json").exists():
        return None
    try:
        record, content = json.loads(path.with_suffix(".json").read_text()), path.read_bytes()
        if (record["key"], record["sha256"]) != (path.stem, hashlib.sha256(content).hexdigest()):
            raise ValueError("its content is not what was written")
        model = torch.load(io.BytesIO(content), map_location=device, weights_only=False)
        return model, record["rows"]
    except Exception as error:  # unpickling can raise anything
        warnings.warn(f"{path} is not used: {error!r}; the step is done again", stacklevel=3)
        return None
