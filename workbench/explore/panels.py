"""Panels to touch: controls beside a picture, and the pure functions that do the work.

`Explorer` puts controls on any function that draws. `Tradeoff` is the panel of the main question:
which candidates fit the limits, and which of these is best? `workbench.explore.limits` answers it
without a kernel or a browser. `layer_view` shows one layer at a time, and `playground` tries single
techniques on a model.

Changes that come from a browser are drawn once they rest, so that a slider in motion does not fill
the kernel with pictures that nobody sees; changes made by code are drawn at once.
"""

import asyncio
import contextlib
import html
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
from torch import nn

from workbench import storage
from workbench.compress import (
    Factorize,
    Prune,
    PruneStructured,
    QuantizeDynamic,
    QuantizeStatic,
    QuantizeWeights,
    Recipe,
    ShareWeights,
    Step,
    coverage,
    steps,
)
from workbench.compress.layers import summary
from workbench.compress.recipe import device_of
from workbench.data import Task
from workbench.deploy.runtimes import prepare
from workbench.explore import plots
from workbench.explore.code import code_of
from workbench.explore.differences import difference
from workbench.explore.facts import facts
from workbench.explore.limits import (
    OBJECTIVES,
    Limits,
    Objective,
    remaining,
    score_lost,
    tightest,
    winner,
)
from workbench.measure import artifact_bytes
from workbench.training import evaluate

_REST_S = 0.15  # without a further change, before a change made in a browser is drawn
_EXAMPLES = 1000  # of the validation split, on which answers are compared


class _Panel(widgets.VBox):
    """Controls whose changes lead to `_show`."""

    _waiting: asyncio.TimerHandle | None = None

    def _follow(self, *controls: widgets.Widget) -> None:
        for control in controls:
            control.observe(self._changed, names="value")

    def _changed(self, _change: object) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        if (loop := _loop_of_browser()) is None:
            self._show()
        else:
            self._waiting = loop.call_later(_REST_S, self._show)

    def _show(self) -> None:
        raise NotImplementedError


class Tradeoff(_Panel):
    """The trade-off with limits to move: what remains is in colour, and the best is named.

    Any one of the best can be opened: its recipe as code and, where models are given, where its
    bytes are and which answers it changed. Thousands of candidates are drawn in a moment.

    Args:
        frame: needs the columns ``name``, ``technique``, ``simulated``, ``size_bytes``, ``score``
            and ``latency_ms``, as one of `workbench.measure.compare` has them; in a column
            ``recipe`` each candidate's recipe may stand, as JSON.
        models: the candidates by name. One that is not there is made when it is opened, by its
            recipe, from the baseline, which has to be there.
        task: what the models are for; its validation split tells the changed answers.

    Raises:
        ValueError: a column is missing, no candidate has been measured, or models without their
            task or without the baseline.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        *,
        models: Mapping[str, nn.Module] | None = None,
        task: Task | None = None,
    ):
        self.frame = frame = plots.ready(frame).reset_index(drop=True)
        self.models, self.task = models, task
        _check_models(frame, models, task)
        self.objective = widgets.Dropdown(options=OBJECTIVES, description="Find the", **_wide())
        self.size = _slider("Size at most", _size_options(frame))
        self.lost = _slider("Lost at most", _lost_options(frame))
        self.simulated = _box("Include simulated", value=True)
        families = dict.fromkeys(map(plots.family, frame["technique"]))
        self.techniques = {name: _box(name, value=True) for name in families}
        self.answer, self.picture = _answer(), _image()
        self.candidate = widgets.Dropdown(options=[], description="Look at", **_wide())
        self.opener = widgets.Button(
            description="Open", tooltip="Where are its bytes, what changed?"
        )
        self.recipe, self.opened, self.inside = _answer(), _answer(), _image()
        controls = widgets.Box(
            [self.objective, self.simulated, self.size, self.lost], layout=_wrapping()
        )
        boxes = widgets.Box([*self.techniques.values()], layout=_wrapping())
        rows = [controls, boxes, self.answer, self.picture]
        if "recipe" in frame or models is not None:
            look = [self.candidate, *([] if models is None else [self.opener])]
            rows += [widgets.Box(look, layout=_wrapping()), self.recipe, self.opened]
            rows += [] if models is None else [self.inside]
        super().__init__(rows)
        self._follow(*controls.children, *boxes.children)
        self.candidate.observe(self._chosen, names="value")
        self.opener.on_click(self._open)
        self._show()

    @property
    def limits(self) -> Limits:
        """The limits as the controls stand."""
        ticked = frozenset(name for name, box in self.techniques.items() if box.value)
        every = len(ticked) == len(self.techniques)
        return Limits(
            None if every else ticked, self.size.value, self.lost.value, self.simulated.value
        )

    @property
    def remaining(self) -> pd.DataFrame:
        """The rows that keep to the limits."""
        return remaining(self.frame, self.limits)

    @property
    def winner(self) -> pd.Series | None:
        """The best of what remains."""
        return winner(self.remaining, self.objective.value)

    def model(self, name: str) -> nn.Module:
        """The candidate of this name, made by its recipe where it is not among the models.

        Raises:
            ValueError: it is not there and has no recipe.
        """
        if name in self.models:
            return self.models[name]
        recipe = _recipe(self.frame, name)
        if recipe is None:
            raise ValueError(f"{name} is not among the models and has no recipe")
        dense = self.models[plots.baseline(self.frame)["name"]]
        return recipe(dense, self.task, progress=False)

    def _show(self) -> None:
        left, best = self.remaining, self.winner
        name = None if best is None else best["name"]
        self.picture.value = plots.tradeoff(self.frame, keep=left["name"], winner=name).png()
        self.answer.value = _status(_line(self.frame, self.limits, self.objective.value))
        fronts = [plots.pareto_front(left, cost) if len(left) else [] for cost in plots.COSTS]
        names = [name] if best is not None else []
        names = [*dict.fromkeys([*names, *fronts[0], *fronts[1]])]
        if list(self.candidate.options) != names:
            self.candidate.options = names
            self.candidate.value = names[0] if names else None
        self._chosen()

    def _chosen(self, _change: object = None) -> None:
        """Show the recipe of the candidate to look at, and forget what was opened before."""
        name = self.candidate.value
        recipe = None if name is None else _recipe(self.frame, name)
        self.recipe.value = "" if recipe is None else _code(code_of(recipe))
        self.opened.value, self.inside.value = "", b""
        self.inside.layout.display = "none"
        self.opener.disabled = name is None

    def _open(self, _button: object) -> None:
        name = self.candidate.value
        self.opener.disabled, self.opened.value = True, _status("Opening …")
        try:
            model = self.model(name)
            few = replace(self.task, validation=_few(self.task, _EXAMPLES))
            dense = self.models[plots.baseline(self.frame)["name"]]
            changed = difference(dense, model, few, split="validation")
            self.inside.value = plots.ledger(_account(model)).png()
            self.inside.layout.display = ""
            self.opened.value = _status(f"<b>{html.escape(name)}</b>") + changed._repr_html_()
        except Exception as error:  # whatever a recipe raises; a browser shows no traceback
            self.opened.value = _status(html.escape(f"{name} cannot be opened: {error}"))
        finally:
            self.opener.disabled = False

    def __repr__(self) -> str:
        return f"Tradeoff({len(self.frame)} candidates)"


class Explorer(_Panel):
    """A picture with one control for each of its settings.

    Args:
        draw: a pure function of the settings that returns a `workbench.explore.plots.Picture`, or
            a pair of one and a line of text to show above it.
        settings: the choices of each, in order; numbers get a slider, texts a list to choose from.
            A mapping shows its keys and passes its values. A function gives such choices, for a
            slider, from the value of the setting before it.

    Raises:
        ValueError: no settings, or one without choices.

    >>> from workbench.explore import plots
    >>> panel = Explorer(lambda bits: plots.Picture(4, 3), bits=[2, 4, 8])
    >>> panel.controls["bits"].value = 8
    >>> panel.settings
    {'bits': 8}
    """

    def __init__(
        self,
        draw: Callable[..., object],
        **settings: Sequence | Mapping[str, object] | Callable[[object], object],
    ):
        if not settings or not all(settings.values()):
            raise ValueError(f"settings are {settings}; give each at least one choice")
        self.draw = draw
        self.controls: dict[str, widgets.Widget] = {}
        before = None
        for name, choices in settings.items():
            control = _control(name, choices, before)
            self.controls[name] = before = control
        self.answer, self.picture = _answer(), _image()
        controls = widgets.Box([*self.controls.values()], layout=_wrapping())
        super().__init__([controls, self.answer, self.picture])
        self._follow(*self.controls.values())
        self._show()

    @property
    def settings(self) -> dict[str, object]:
        """The settings as the controls stand."""
        return {name: control.value for name, control in self.controls.items()}

    def _show(self) -> None:
        drawn = self.draw(**self.settings)
        picture, line = drawn if isinstance(drawn, tuple) else (drawn, "")
        self.picture.value = picture.png()
        self.answer.value = _status(html.escape(line)) if line else ""

    def __repr__(self) -> str:
        return f"Explorer({', '.join(self.controls)})"


def layer_view(model: nn.Module, table: pd.DataFrame, sensitivity: pd.DataFrame) -> Explorer:
    """A panel that shows one layer at a time: its weights, their spectrum, what it can stand, and
    what it has of the bytes and of the work.

    Args:
        table: from `layer_table`.
        sensitivity: from `workbench.compress.sensitivity`, for one technique.

    The same without a kernel: `layer_table`, and `workbench.explore.plots.layer` for one layer.
    """

    def draw(layer: str) -> tuple[plots.Picture, str]:
        row = table.set_index("layer").loc[layer]
        rows = sensitivity[sensitivity["layer"] == layer]
        worst = rows.loc[rows["drop"].astype(float).idxmax()]
        lost = _loss(round(worst["drop"], 6), sensitivity)
        line = (
            f"{layer} ({row['type']}): {row['weights']:,} weights, {_bytes(row['size_bytes'])}, "
            f"{row['byte_share']:.1%} of the file, {row['macs']:,} multiplications, "
            f"{row['mac_share']:.1%} of all. At level {worst['level']:g}, alone, it loses {lost}."
        )
        return plots.layer(model, layer, table, sensitivity), line

    return Explorer(draw, layer=list(table["layer"]))


def layer_table(model: nn.Module, task: Task, sensitivity: pd.DataFrame) -> pd.DataFrame:
    """What each layer is and has, one row for each in ``sensitivity``.

    Columns: ``layer``, ``type``, ``weights``, ``size_bytes`` (of its entries in the plain file) and
    ``byte_share``, ``macs`` of one example and ``mac_share``, ``directions`` (how many hold 90 % of
    its energy) and ``drop`` (the most that it loses at any level).
    """
    first = sensitivity.groupby("layer", sort=False).first()
    found = facts(model, task.example_input).layers.set_index("layer").loc[first.index]
    spectra = {n: plots.singular_values(plots.layer_weight(model, n)) for n in first.index}
    return pd.DataFrame({
        "layer": first.index,
        "type": found["type"].to_numpy(),
        "weights": first["weights"].to_numpy(),
        "size_bytes": first["dense_bytes"].to_numpy(),
        "byte_share": (first["dense_bytes"] / first["model_bytes"]).to_numpy(),
        "macs": found["macs"].to_numpy(),
        "mac_share": found["mac_share"].to_numpy(),
        "directions": [plots.rank_for(spectra[name], 0.9) for name in first.index],
        "drop": sensitivity.groupby("layer", sort=False)["drop"].max().to_numpy(),
    })  # fmt: skip


TECHNIQUES: Mapping[str, Sequence[Step]] = {
    "round the weights": [QuantizeWeights(bits=bits) for bits in (8, 6, 5, 4, 3, 2)],
    "share values": [ShareWeights(clusters=count) for count in (255, 63, 31, 15, 7, 3)],
    "prune weights": [Prune(sparsity=share) for share in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)],
    "prune channels": [
        PruneStructured(parameters=share, importance="l2", round_to=1)
        for share in (0.9, 0.8, 0.7, 0.5, 0.3)
    ],
    "factorize": [Factorize(parameters=share) for share in (0.9, 0.7, 0.5, 0.3)],
    "int8, inputs too": [QuantizeStatic(granularity=per) for per in ("channel", "tensor")],
    "int8, inputs rounded anew": [QuantizeDynamic()],
}


def playground(
    model: nn.Module,
    task: Task,
    *,
    techniques: Mapping[str, Sequence[Step]] = TECHNIQUES,
    examples: int = 500,
    codec: str | None = None,
) -> Explorer:
    """A panel that applies one technique to a model, without training, and keeps every result.

    Args:
        techniques: the steps of each, from the mildest to the harshest.
        examples: of the validation split, on which models are scored.
        codec: of the files whose bytes are counted, as in `workbench.storage.save`; None leaves
            them plain.

    The same without a kernel: `attempt`, for each step, and `workbench.explore.plots.tradeoff`.
    """
    few = replace(task, validation=_few(task, examples))
    rows = {"": attempt(model, few, None, codec=codec)}

    def draw(technique: str, setting: Step) -> tuple[plots.Picture, str]:
        name = repr(setting)
        if name not in rows:
            rows[name] = attempt(model, few, setting, codec=codec)
        frame, row = pd.DataFrame(rows.values()), rows[name]
        if row["error"]:
            return plots.tradeoff(frame), f"{name} is refused: {row['error']}"
        kept = f"; {row['agreement']:.1%} of the answers are the same" if row["agreement"] else ""
        line = f"{name}: {numbers(row, frame)}{kept}. {row['left'][:1].upper()}{row['left'][1:]}."
        return plots.tradeoff(frame, winner=name), line

    return Explorer(
        draw, technique=list(techniques), setting=lambda technique: _levels(techniques[technique])
    )


def attempt(
    model: nn.Module, task: Task, step: Step | None, *, codec: str | None = None
) -> dict[str, object]:
    """What one step does to a model, scored on the validation split; None for the model as it is.

    A row for `workbench.explore.plots.tradeoff`, and ``agreement`` (share of equal answers; None
    where there are no classes to compare), ``left`` (what the step reached, and why not all) and
    ``error``: why it was refused, or "". Speed is not measured: compare the best with
    `workbench.measure.compare`.
    """
    row = {
        "name": "as it is" if step is None else repr(step), "technique": "none", "simulated": False,
        "size_bytes": math.nan, "score": math.nan, "latency_ms": math.nan,
        "metric": task.metric.name, "higher_is_better": task.metric.higher_is_better,
        "verdict": "baseline" if step is None else "", "agreement": None, "left": "", "error": "",
    }  # fmt: skip
    try:
        small = model if step is None else _quietly(step, model, task)
        row["size_bytes"] = artifact_bytes(small, codec=codec)
        row["score"] = evaluate(small, task, split="validation", device=device_of(small)).value
    except Exception as error:  # a technique may refuse a model in its own words
        return row | {"error": str(error)}
    if step is not None:
        row["technique"] = " + ".join(steps(small)) or "none"
        row["simulated"] = prepare(small, "eager", example_input=task.example_input).simulated
        row["left"] = _left(small)
        with contextlib.suppress(ValueError):  # no classes to compare
            row["agreement"] = difference(model, small, task, split="validation").agreement
    return row


def _loop_of_browser() -> asyncio.AbstractEventLoop | None:
    """The event loop, if what runs in it now is a message of a widget and not a cell."""
    ipython = sys.modules.get("IPython")
    kernel = getattr(ipython and ipython.get_ipython(), "kernel", None)
    if kernel is None or kernel.get_parent().get("header", {}).get("msg_type") != "comm_msg":
        return None
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _check_models(
    frame: pd.DataFrame, models: Mapping[str, nn.Module] | None, task: Task | None
) -> None:
    if (models is None) != (task is None):
        raise ValueError("give both models and task, or neither")
    reference = plots.baseline(frame)
    if models is not None and (reference is None or reference["name"] not in models):
        name = "a baseline" if reference is None else f"the baseline, {reference['name']!r}"
        raise ValueError(f"models are {list(models)}; {name} has to be among them")


def _recipe(frame: pd.DataFrame, name: str) -> Recipe | None:
    written = frame.loc[frame["name"] == name, "recipe"].iloc[0] if "recipe" in frame else None
    return Recipe.from_json(written) if isinstance(written, str) and written else None


def _account(model: nn.Module) -> storage.Ledger:
    """Where the bytes of the plain file of a model are."""
    with tempfile.TemporaryDirectory() as folder:
        return storage.save(model, Path(folder, "model.safetensors"), codec="plain", progress=False)


def _few(task: Task, count: int) -> object:
    """The first drawn examples of the validation split, all of them where there are fewer."""
    return task.validation.subset(min(count, len(task.validation)), seed=0)


def _control(
    name: str, choices: Sequence | Mapping[str, object] | Callable, before: widgets.Widget | None
) -> widgets.Widget:
    given = choices(before.value) if callable(choices) else choices
    pairs = _pairs(given)
    numbers = all(isinstance(value, (int, float)) for _, value in pairs)
    description = name.replace("_", " ").capitalize()
    if not numbers and not callable(choices):
        return widgets.Dropdown(options=pairs, description=description, **_wide())
    slider = widgets.SelectionSlider(
        options=pairs, description=description, continuous_update=False, **_wide()
    )
    if callable(choices):

        def offer(change: dict) -> None:
            slider.options = _pairs(choices(change["new"]))

        before.observe(offer, names="value")
    return slider


def _pairs(choices: Sequence | Mapping[str, object]) -> list[tuple[str, object]]:
    return [*choices.items()] if isinstance(choices, Mapping) else [(f"{c}", c) for c in choices]


def _levels(steps: Sequence[Step]) -> dict[str, Step]:
    """The steps by the settings in which they differ: "bits=8"."""
    settings = [step.settings() for step in steps]
    differ = [key for key in settings[0] if len({repr(each.get(key)) for each in settings}) > 1]
    names = [", ".join(f"{key}={each.get(key)!r}" for key in differ) for each in settings]
    return {name or "as usual": step for name, step in zip(names, steps, strict=True)}


def _quietly(step: Step, model: nn.Module, task: Task) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a step did nothing is said in words
        return step(model, task, progress=False)


def _left(small: nn.Module) -> str:
    """How much of the model the last step reached, and why not all of it."""
    table = coverage(small)
    reasons = table[table["reason"] != ""].groupby("reason", sort=False)["layer"].agg(", ".join)
    left = "; ".join(f"{layers}: {reason}" for reason, layers in reasons.items())
    reached = summary(small) or "all layers changed"
    return f"{reached}; left {left}" if left and not reached.startswith("nothing") else reached


def _image() -> widgets.Image:
    layout = {"max_width": "100%", "width": "900px"}
    return widgets.Image(format="png", layout=layout)  # with a tooltip, a browser shows none of it


def _answer() -> widgets.HTML:
    return widgets.HTML(layout={"width": "auto", "max_width": "900px"})


def _code(text: str) -> str:
    """Code to select and copy; with the keyboard, it can be scrolled."""
    return (
        '<pre tabindex="0" style="margin:4px; padding:6px; overflow-x:auto; line-height:1.3; '
        f'background:rgba(127,127,127,0.12)">{html.escape(text)}</pre>'
    )


def _status(line: str) -> str:
    """A line that screen readers announce when it changes."""
    return f'<p role="status" aria-live="polite" style="margin:4px">{line}</p>'


def _line(frame: pd.DataFrame, limits: Limits, objective: Objective) -> str:
    """The answer in one line of HTML."""
    left = remaining(frame, limits)
    best = winner(left, objective)
    if best is not None:
        count = f"{len(left)} of {len(frame)} remain"
        name, facts = html.escape(best["name"]), html.escape(numbers(best, frame))
        return f"The {objective} is <b>{name}</b>: {facts}. {count}."
    if len(left):
        return (
            f"None of the {len(left)} that remain can be the fastest: simulated candidates have no "
            "speed of their own."
        )
    advice = {
        "techniques": "tick another technique",
        "size_bytes": f"loosen the size, now at most {_bytes(limits.size_bytes)}",
        "score_lost": f"loosen the loss, now at most {_loss(limits.score_lost, frame)}",
        "simulated": "include simulated candidates",
        None: "loosen more than one limit",
    }
    return f"Nothing fits: {advice[tightest(frame, limits)]}."


def numbers(row: pd.Series, frame: pd.DataFrame) -> str:
    """Size, score, latency and verdict of one row of ``frame``, as far as they are known."""
    score = f"{row['score']:.1%}" if plots.is_percent(frame) else f"{row['score']:.4g}"
    metric = frame["metric"].iloc[0] if "metric" in frame else "score"
    parts = [f"{metric} {score}"]
    if not math.isnan(row["size_bytes"]):
        parts.insert(0, _bytes(row["size_bytes"]))
    if not math.isnan(row["latency_ms"]):
        parts.append(f"{row['latency_ms']:.3g} ms")
    verdict = row.get("verdict")  # NaN where only some rows of a frame have one
    verdict = verdict if isinstance(verdict, str) else ""
    if verdict := verdict or ("simulated" if row["simulated"] else ""):
        parts.append(verdict)
    return ", ".join(parts)


def _bytes(size_bytes: float) -> str:
    if size_bytes >= 1e7:
        return f"{size_bytes / 1e6:,.4g} MB"
    return f"{size_bytes / 1e3:,.0f} kB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.3g} kB"


def _loss(score: float, frame: pd.DataFrame) -> str:
    return f"{100 * score:g} points" if plots.is_percent(frame) else f"{score:g}"


def _size_options(frame: pd.DataFrame) -> list[tuple[str, float]]:
    sizes = frame["size_bytes"].dropna()
    steps = _series(sizes.min(), sizes.max(), (1, 1.5, 2, 3, 5, 7)) if len(sizes) else []
    return [(_bytes(step), step) for step in steps] + [("any size", math.inf)]


def _lost_options(frame: pd.DataFrame) -> list[tuple[str, float]]:
    worst = score_lost(frame).max()
    least = 0.001 if plots.is_percent(frame) else 0.01
    steps = [] if math.isnan(worst) else [0.0]
    steps += _series(least, worst, (1, 2, 5)) if worst > 0 else []
    return [(_loss(step, frame), step) for step in steps] + [("any loss", math.inf)]


def _series(low: float, high: float, digits: tuple[float, ...]) -> list[float]:
    """Round numbers in even logarithmic steps, from just above ``low`` to below ``high``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    numbers = [float(f"{digit}e{power}") for power in powers for digit in digits]
    return [number for number in numbers if low <= number < high]


def _wide() -> dict:
    return {
        "style": {"description_width": "110px"},
        "layout": {"width": "400px", "max_width": "100%"},
    }


def _slider(description: str, options: list[tuple[str, float]]) -> widgets.SelectionSlider:
    return widgets.SelectionSlider(
        options=options, value=math.inf, description=description, continuous_update=False, **_wide()
    )


def _box(description: str, *, value: bool) -> widgets.Checkbox:
    return widgets.Checkbox(
        value=value, description=description, indent=False, layout={"width": "auto"}
    )


def _wrapping() -> dict:
    return {"flex_flow": "row wrap", "max_width": "900px", "grid_gap": "2px 16px"}
