"""Panels to touch: controls beside a picture, and the pure functions that do the work.

`Explorer` puts controls on any function that draws. `Tradeoff` is the panel of the main question:
which candidates fit the limits, and which of these is best? `remaining` and `winner` answer it
without a kernel or a browser.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import ipywidgets as widgets
import pandas as pd

from workbench.explore import plots

Objective = Literal["fastest", "smallest", "most accurate"]
OBJECTIVES = ("fastest", "smallest", "most accurate")


@dataclass(frozen=True)
class Limits:
    """What a candidate must keep to; the defaults let everything through.

    ``techniques`` are families (see `workbench.explore.plots.family`), None for all.
    ``score_lost`` is how much worse than the baseline a score may be, in units of the metric:
    0.01 is one point of accuracy.
    """

    techniques: frozenset[str] | None = None
    size_bytes: float = math.inf
    score_lost: float = math.inf
    simulated: bool = True


def remaining(frame: pd.DataFrame, limits: Limits) -> pd.DataFrame:
    """The rows of the frame that were measured and keep to every limit."""
    frame = plots.ready(frame)
    fits = frame["score"].notna()
    if limits.techniques is not None:
        fits &= frame["technique"].map(plots.family).isin(limits.techniques)
    if not limits.simulated:
        fits &= ~frame["simulated"]
    if limits.size_bytes < math.inf:
        fits &= frame["size_bytes"] <= limits.size_bytes
    if limits.score_lost < math.inf:
        fits &= score_lost(frame) <= limits.score_lost + 1e-9  # 0.91 - 0.90 is a little over 0.01
    return frame[fits]


def winner(candidates: pd.DataFrame, objective: Objective) -> pd.Series | None:
    """The best row, the first one of equals; None if there is none.

    A simulated candidate can be the smallest or the most accurate, but never the fastest.

    Raises:
        ValueError: unknown objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    if candidates.empty:
        return None
    candidates = plots.ready(candidates)
    if objective == "fastest":
        order = candidates["latency_ms"][~candidates["simulated"]].dropna()
    elif objective == "smallest":
        order = candidates["size_bytes"].dropna()
    else:
        sign = -1 if plots.is_higher_better(candidates) else 1
        order = sign * candidates["score"].dropna()
    return candidates.loc[order.idxmin()] if len(order) else None


def tightest(frame: pd.DataFrame, limits: Limits) -> str | None:
    """The one limit whose lifting lets most candidates in; None if no single one lets any in.

    It is a field of `Limits`.
    """
    lifted = {name: replace(limits, **{name: value}) for name, value in vars(Limits()).items()}
    counts = {name: len(remaining(frame, looser)) for name, looser in lifted.items()}
    best = max(counts, key=counts.get)
    return best if counts[best] else None


def score_lost(frame: pd.DataFrame) -> pd.Series:
    """How much worse than the baseline each score is; negative where it is better.

    NaN where there is no baseline.
    """
    reference = plots.baseline(frame)
    lost = (math.nan if reference is None else reference["score"]) - frame["score"]
    return lost if plots.is_higher_better(frame) else -lost


class Tradeoff(widgets.VBox):
    """The trade-off with limits to move: what remains is in colour, and the best is named.

    Needs the columns ``name``, ``technique``, ``simulated``, ``size_bytes``, ``score`` and
    ``latency_ms``; a frame of `workbench.measure.compare` has them.

    Raises:
        ValueError: a column is missing, or no candidate has been measured.
    """

    def __init__(self, frame: pd.DataFrame):
        self.frame = frame = plots.ready(frame).reset_index(drop=True)
        self.objective = widgets.Dropdown(options=OBJECTIVES, description="Find the", **_wide())
        self.size = _slider("Size at most", _size_options(frame))
        self.lost = _slider("Lost at most", _lost_options(frame))
        self.simulated = _box("Include simulated", value=True)
        families = dict.fromkeys(map(plots.family, frame["technique"]))
        self.techniques = {name: _box(name, value=True) for name in families}
        self.picture = widgets.Image(format="png", layout={"max_width": "100%", "width": "900px"})
        self.answer = widgets.HTML(layout={"width": "auto"})
        controls = widgets.Box(
            [self.objective, self.simulated, self.size, self.lost], layout=_wrapping()
        )
        boxes = widgets.Box([*self.techniques.values()], layout=_wrapping())
        super().__init__([controls, boxes, self.answer, self.picture])
        for control in (*controls.children, *boxes.children):
            control.observe(self._show, names="value")
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

    def _show(self, _change: object = None) -> None:
        left, best = self.remaining, self.winner
        name = None if best is None else best["name"]
        self.picture.value = plots.tradeoff(self.frame, keep=list(left["name"]), winner=name).png()
        line = _line(self.frame, self.limits, self.objective.value)
        self.answer.value = _status(line)

    def __repr__(self) -> str:
        return f"Tradeoff({len(self.frame)} candidates)"


class Explorer(widgets.VBox):
    """A picture with one control for each of its settings.

    Args:
        draw: a pure function of the settings that returns a `workbench.explore.plots.Picture`, or
            a pair of one and a line of text to show above it.
        settings: the choices of each, in order; numbers get a slider, texts a list to choose from.
            A mapping shows its keys and passes its values.

    Raises:
        ValueError: no settings, or one without choices.

    >>> from workbench.explore import plots
    >>> panel = Explorer(lambda bits: plots.Picture(4, 3), bits=[2, 4, 8])
    >>> panel.controls["bits"].value = 8
    >>> panel.settings
    {'bits': 8}
    """

    def __init__(self, draw: Callable[..., object], **settings: Sequence | Mapping[str, object]):
        if not settings or not all(settings.values()):
            raise ValueError(f"settings are {settings}; give each at least one choice")
        self.draw = draw
        self.controls = {name: _control(name, choices) for name, choices in settings.items()}
        self.picture = widgets.Image(format="png", layout={"max_width": "100%", "width": "900px"})
        self.answer = widgets.HTML(layout={"width": "auto"})
        controls = widgets.Box([*self.controls.values()], layout=_wrapping())
        super().__init__([controls, self.answer, self.picture])
        for control in self.controls.values():
            control.observe(self._show, names="value")
        self._show()

    @property
    def settings(self) -> dict[str, object]:
        """The settings as the controls stand."""
        return {name: control.value for name, control in self.controls.items()}

    def _show(self, _change: object = None) -> None:
        drawn = self.draw(**self.settings)
        picture, line = drawn if isinstance(drawn, tuple) else (drawn, "")
        self.picture.value = picture.png()
        self.answer.value = _status(html.escape(line)) if line else ""

    def __repr__(self) -> str:
        return f"Explorer({', '.join(self.controls)})"


def _control(name: str, choices: Sequence | Mapping[str, object]) -> widgets.Widget:
    pairs = [*choices.items()] if isinstance(choices, Mapping) else [(f"{c}", c) for c in choices]
    numbers = all(isinstance(value, (int, float)) for _, value in pairs)
    description = name.replace("_", " ").capitalize()
    if numbers:
        return widgets.SelectionSlider(
            options=pairs, description=description, continuous_update=False, **_wide()
        )
    return widgets.Dropdown(options=pairs, description=description, **_wide())


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
    metric = row.get("metric", "score")
    parts = [f"{metric} {score}"]
    if not math.isnan(row["size_bytes"]):
        parts.insert(0, _bytes(row["size_bytes"]))
    if not math.isnan(row["latency_ms"]):
        parts.append(f"{row['latency_ms']:.3g} ms")
    if verdict := row.get("verdict") or ("simulated" if row["simulated"] else ""):
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
    return {"style": {"description_width": "110px"}, "layout": {"width": "400px"}}


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
