"""Pictures of what a technique did: the trade-off, the weights, the answers, a curve.

Each function draws one picture from data that the notebook can assert on, and returns it. The
pictures share a palette that colour-blind readers can tell apart (Okabe and Ito, 2008, "Color
Universal Design") and give each technique a marker of its own.
"""

import functools
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox
from torch import Tensor, nn

from workbench.compress import computed
from workbench.data import Task
from workbench.explore import labels
from workbench.explore.differences import class_name, kind_of_change, paired_outputs
from workbench.measure.peaks import Roofs
from workbench.storage.ledger import KIND_COLUMNS, Ledger

BLACK, GREY, FAINT = "#000000", "0.45", "0.82"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("s", "^", "D", "v", "P", "X", "p")
UNTOUCHED = "no technique"  # the family of a model as it is
_CROWD = 80  # candidates, from which on single ones are too many to name
_STYLE = {"font.size": 11.5, "axes.spines.top": False, "axes.spines.right": False}


class Picture(Figure):
    """A figure that a notebook shows exactly once: pyplot does not know of it."""

    def __init__(self, width_inches: float, height_inches: float):
        super().__init__(figsize=(width_inches, height_inches), layout="constrained", dpi=100)
        FigureCanvasAgg(self)

    def png(self, *, dpi: int = 100) -> bytes:
        """The picture as the bytes of a PNG file."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=dpi)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def tradeoff(
    frame: pd.DataFrame, *, keep: Collection[str] | None = None, winner: str | None = None
) -> Picture:
    """Score against size and against latency: what each candidate gives, and what it costs.

    Bars are the intervals of the frame, dashed lines the baseline, the stepped line the Pareto
    front (see `pareto_front`). Hollow markers are simulated candidates. A name that has no room
    is left out. A crowd of more than 80 is drawn small and without bars, and names only the
    baseline and the winner. Without any latency there is one panel.

    Args:
        frame: from `workbench.measure.compare`; at least the columns ``name``, ``technique``,
            ``simulated``, ``size_bytes``, ``score`` and ``latency_ms``.
        keep: names of the candidates to show in colour, by default all.
        winner: name of a candidate to ring.

    Raises:
        ValueError: a column is missing, or no candidate has been measured.
    """
    frame = ready(frame)
    measured = frame[frame["score"].notna()]
    if measured.empty:
        raise ValueError("no candidate of the frame has a score; see its error column")
    kept = measured if keep is None else measured[measured["name"].isin(list(keep))]
    with rc_context(_STYLE):
        picture = Picture(9, 4.4)
        costs = COSTS[: 1 + measured["latency_ms"].notna().any()]
        grid = picture.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        panels, left = dict(zip(costs, grid, strict=True)), grid[0]
        bars = {cost: _points(axes, measured, kept, cost) for cost, axes in panels.items()}
        left.set_ylabel(score_label(frame))
        if is_percent(frame):
            left.yaxis.set_major_formatter(FuncFormatter(_percent))
        _legend(picture, measured)
        if lost := frame["name"][frame["score"].isna()].tolist():
            footnote = _shortened(f"Not shown, could not be measured: {', '.join(lost)}", 110)
            picture.supxlabel(footnote, x=0.01, ha="left", fontsize=10, color=GREY)
        picture.get_layout_engine().execute(picture)  # names are placed into the layout
        picture.set_layout_engine("none")
        for cost, axes in panels.items():
            _names(axes, measured, kept, cost, winner, bars[cost])
    return picture


def pareto_front(frame: pd.DataFrame, cost: str = "size_bytes") -> list[str]:
    """Names of the candidates that no other beats on both cost and score, cheapest first.

    ``cost`` is a column where less is better. A simulated candidate has no speed to offer, so it
    is never on the front of a latency; its size is real.
    """
    frame = ready(frame, [*NEEDED, cost])
    rows = frame[frame[cost].notna() & frame["score"].notna()]
    if cost.startswith("latency"):
        rows = rows[~rows["simulated"]]
    better = rows["score"] if is_higher_better(frame) else -rows["score"]
    rows = rows.assign(_better=better).sort_values([cost, "_better"], ascending=[True, False])
    front, best, best_cost = [], -math.inf, None
    for name, price, gain in zip(rows["name"], rows[cost], rows["_better"], strict=True):
        if gain > best or (gain == best and price == best_cost):
            front.append(name)
            best, best_cost = gain, price
    return front


def weights(
    before: nn.Module | Tensor, after: nn.Module | Tensor | None = None, *, layer: str | None = None
) -> Picture:
    """How the weights of one layer are spread, before and after a technique.

    Where a technique left at most 64 different values, each is drawn as a line of its own.

    Args:
        before, after: a model or a tensor.
        layer: name of a layer or of a weight, by default the largest weight of ``before``.

    Raises:
        ValueError: the model has no such layer, or no weight at all.
    """
    if layer is None and isinstance(before, nn.Module):
        layer = _largest_weight(before)
    values = {"before": _values(before, layer)}
    if after is not None:
        values["after"] = _values(after, layer)
    with rc_context(_STYLE):
        picture = Picture(7, 2 + 1.6 * len(values))
        rows = picture.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
        edges = np.linspace(*_range(values["before"]), 81)
        for axes, (title, weight), colour in zip(rows, values.items(), COLOURS, strict=False):
            flat = weight.flatten().numpy()
            levels, counts = np.unique(flat, return_counts=True)
            # A value that over half of the weights have, as a rule zero, would hide the others.
            log = counts.max() > len(flat) / 2
            if len(levels) <= 64:
                axes.vlines(levels, 0.5 if log else 0, counts, color=colour, linewidth=2)
                axes.plot(levels, counts, "o", color=colour, markersize=4)
            else:
                axes.hist(flat, bins=edges, color=colour)
            axes.set_yscale("log" if log else "linear")
            axes.set_ylim(bottom=0.5 if log else 0)
            axes.set_ylabel("weights (log)" if log else "weights")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
            text = f"{title}: {_spread(weight)}"
            axes.set_title(text, loc="left", fontsize=10)
        where = f" in layer {layer.removesuffix('.weight')}" if layer else ""
        rows[-1].set_xlabel(f"value of a weight{where}")
    return picture


def answer_changes(
    task: Task, before: Callable[..., Tensor], after: Callable[..., Tensor], *, split: str = "test"
) -> pd.DataFrame:
    """The examples whose answer is not the same before and after a technique, one row each.

    Columns: ``index`` in the split, ``target``, the answers ``before`` and ``after`` (label names
    where the task has them), and ``kind``: "fixed" (wrong, then right), "broken" (right, then
    wrong) or "other" (wrong both times).

    Raises:
        ValueError: the models do not give one answer per example.
    """
    return _changes(task, before, after, split)[0]


def confusion_change(
    task: Task, before: Callable[..., Tensor], after: Callable[..., Tensor], *, split: str = "test"
) -> Picture:
    """Which answers a technique changed: how often each one became each other.

    Beside the matrix, what the changes did to the score; below, where the inputs are images, the
    first that were right and are now wrong. The rows behind it come from `answer_changes`.
    """
    changes, images = _changes(task, before, after, split)
    broken = changes.index[changes["kind"] == "broken"][:8]
    thumbnails = [(changes.loc[row], images[row]) for row in broken if row in images]
    with rc_context(_STYLE):
        picture = Picture(9, 6.3 if thumbnails else 4.8)
        parts = picture.subfigures(2, 1, height_ratios=(3.2, 1)) if thumbnails else [picture]
        matrix, summary = parts[0].subplots(1, 2, width_ratios=(1.5, 1))
        _matrix(matrix, changes, _classes(task, changes))
        _summary(summary, changes)
        if thumbnails:
            parts[1].suptitle("right before, wrong after", fontsize=10, x=0.01, ha="left")
            for axes in (row := parts[1].subplots(1, 8)):
                axes.set_axis_off()
            for axes, (change, image) in zip(row, thumbnails, strict=False):
                axes.imshow(image, cmap="gray_r" if image.ndim == 2 else None)
                axes.set_title(f"{change['before']}\n→ {change['after']}", fontsize=9)
    return picture


def curve(
    frame: pd.DataFrame,
    x: str,
    y: str = "score",
    by: str | None = None,
    *,
    references: Mapping[str, float] | None = None,
    x_label: str | None = None,
    y_label: str | None = None,
) -> Picture:
    """One line per value of ``by``: column ``y`` against column ``x``, with reference lines.

    Bars are drawn where the frame has the interval, as ``score_low`` and ``score_high`` or
    ``latency_low_ms`` and ``latency_high_ms``. ``references`` maps a name, such as "float32" or
    "chance", to the value of ``y`` at which a dashed line is drawn.

    >>> accuracy = pd.DataFrame({"bits": [8, 4, 2], "score": [0.91, 0.90, 0.55]})
    >>> curve(accuracy, "bits", references={"chance": 0.1})
    <Picture size 700x400 with 1 Axes>
    """
    _check_columns(frame, [x, y, *([by] if by else [])])
    groups = [("", frame)] if by is None else frame.groupby(by, sort=False)
    low, high = interval_columns(y)
    with rc_context(_STYLE):
        picture = Picture(7, 4)
        axes = picture.subplots()
        for i, (name, rows) in enumerate(groups):
            rows = rows.sort_values(x)
            error = None
            if low in rows and high in rows:
                error = [rows[y] - rows[low], rows[high] - rows[y]]
            axes.errorbar(
                rows[x], rows[y], yerr=error, label=str(name), color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)], capsize=3, linewidth=1.6,
            )  # fmt: skip
        for i, (name, value) in enumerate((references or {}).items()):
            line = (0, ((5, 3), (1, 2), (5, 2, 1, 2))[i % 3])
            axes.axhline(value, color=GREY, linestyle=line, linewidth=1.2, label=name)
        if pd.api.types.is_integer_dtype(frame[x]):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x_label or x.replace("_", " "))
        axes.set_ylabel(y_label or (score_label(frame) if y == "score" else y.replace("_", " ")))
        if y == "score" and is_percent(frame):
            axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        if by or references:
            handles, names = axes.get_legend_handles_labels()  # reference lines come first
            count = len(references or {})
            axes.legend(
                handles[count:] + handles[:count], names[count:] + names[:count], frameon=False
            )
    return picture


def heatmap(
    frame: pd.DataFrame,
    x: str,
    y: str,
    value: str,
    *,
    value_label: str | None = None,
    middle: float | None = None,
    form: str = "{:.1f}",
) -> Picture:
    """Column ``value`` as a coloured and numbered cell for each pair of ``x`` and ``y``.

    Rows and columns keep the order in which they first appear. With ``middle``, such as 0 for a
    change, colours tell above (green) from below (violet) it; otherwise darker is more.

    Raises:
        ValueError: a column is missing, or two rows share a cell.
    """
    _check_columns(frame, [x, y, value])
    if frame.duplicated([x, y]).any():
        raise ValueError(f"two rows of the frame share one {x} and {y}; average them first")
    table = frame.set_index([y, x])[value]
    rows, columns = frame[y].unique(), frame[x].unique()
    values = np.array([[table.get((row, column), math.nan) for column in columns] for row in rows])
    with rc_context(_STYLE):
        picture = Picture(2.6 + 0.75 * values.shape[1], 1.5 + 0.38 * values.shape[0])
        axes = picture.subplots()
        if middle is None:
            colours = {"cmap": "Blues"}
        else:
            reach = np.nanmax(np.abs(values - middle)) or 1.0
            colours = {"cmap": "PRGn", "vmin": middle - reach, "vmax": middle + reach}
        image = axes.imshow(values, aspect="auto", **colours)
        for (row, column), number in np.ndenumerate(values):
            if not math.isnan(number):
                shade = image.cmap(image.norm(number))
                dark = np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.5
                axes.text(column, row, form.format(number), ha="center", va="center",
                          color="white" if dark else BLACK, fontsize=10)  # fmt: skip
        axes.set_xticks(range(values.shape[1]), [f"{c:g}" if not isinstance(c, str) else c
                                                 for c in columns])  # fmt: skip
        axes.set_yticks(range(values.shape[0]), [str(r) for r in rows])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(x.replace("_", " "))
        axes.set_ylabel(y.replace("_", " "))
        axes.set_title(value_label or value.replace("_", " "), fontsize=11.5, loc="left")
    return picture


def ranked(frame: pd.DataFrame, name: str, *, value: str = "score", label: str | None = None,
           mark: str | None = None, lower_is_better: bool | None = None) -> Picture:  # fmt: skip
    """One line per row, best at the top: column ``value`` as a dot, with its interval.

    ``mark`` is the name of a row to point out. Of its score a frame knows whether higher is better;
    of another value, say it.
    """
    _check_columns(frame, [name, value])
    if lower_is_better is None:
        if value != "score" and "higher_is_better" not in frame:
            raise ValueError(f"give lower_is_better=True or False: which {value!r} is the best?")
        lower_is_better = not is_higher_better(frame)
    rows = frame.sort_values(value, ascending=not lower_is_better)
    low, high = interval_columns(value)
    with rc_context(_STYLE):
        picture = Picture(7.5, 1.2 + 0.26 * len(rows))
        axes = picture.subplots()
        for place, (_, row) in enumerate(rows.iterrows()):
            chosen = row[name] == mark
            error = None
            if low in rows and high in rows:
                error = [[row[value] - row[low]], [row[high] - row[value]]]
            axes.errorbar(
                row[value], place, xerr=error, capsize=3, linewidth=1.4,
                color=COLOURS[1] if chosen else COLOURS[0], marker="D" if chosen else "o",
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), list(rows[name]), fontsize=10)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        if value == "score":
            axes.set_xlabel(label or score_label(frame))
            if is_percent(frame):
                axes.xaxis.set_major_formatter(FuncFormatter(_percent))
        else:
            axes.set_xlabel(label or value.replace("_", " "))
    return picture


def found(
    frame: pd.DataFrame,
    *,
    size_bytes: float = math.inf,
    lost: float = math.inf,
    winner: str | None = None,
) -> Picture:
    """What a search looked at and what it trained: size against what is lost, with the limits.

    Args:
        frame: of `workbench.explore.search`.
        size_bytes, lost: the limits; what keeps to both lies in the shaded corner.
        winner: name of a candidate to ring.
    """
    _check_columns(frame, ["name", "stage", "size_bytes", "lost"])
    factor = 100 if is_percent(frame) else 1
    with rc_context(_STYLE):
        picture = Picture(7, 4.2)
        axes = picture.subplots()
        for stage, looks in _STAGES.items():
            rows = frame[frame["stage"].eq(stage)]
            axes.plot(rows["size_bytes"] / 1e3, rows["lost"] * factor, label=stage, **looks)
        trained = frame[frame["stage"].eq("trained") & frame["lost"].notna()]
        ranks = trained.assign(score=-trained["lost"], higher_is_better=True)
        front = ranks.set_index("name").loc[pareto_front(ranks) if len(ranks) else []]
        axes.step(front["size_bytes"] / 1e3, front["lost"] * factor, where="post", color=GREY)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        # Losses far beyond the limit are all the same; near zero they are told apart.
        axes.set_yscale("symlog", linthresh=2 * factor / 100)
        axes.set_ylim(bottom=(1.4 * min(0, frame["lost"].min()) - 0.005) * factor)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        right, top = axes.get_xlim()[1], axes.get_ylim()[1]
        (left, _), (bottom, _) = axes.get_xlim(), axes.get_ylim()
        axes.set(xlim=(left, right), ylim=(bottom, top))  # the rest moves nothing
        corner = (min(size_bytes / 1e3, right), min(lost * factor, top))
        inside = Rectangle(
            (left, bottom), corner[0] - left, corner[1] - bottom, zorder=0, color=COLOURS[2],
            alpha=0.12, label="within the limits",
        )  # fmt: skip
        axes.add_patch(inside)
        if winner is not None:
            best = frame[frame["name"].eq(winner)]
            axes.plot(best["size_bytes"] / 1e3, best["lost"] * factor, "o", markersize=15,
                      markerfacecolor="none", color=BLACK, label=winner)  # fmt: skip
        axes.set_xlabel("size of the saved model (kB)")
        metric = frame["metric"].iloc[0] if "metric" in frame else "score"
        axes.set_ylabel(f"points of {metric} lost" if factor == 100 else f"{metric} lost")
        picture.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=10,
                       handletextpad=0.3, columnspacing=1.2)  # fmt: skip
    return picture


_STAGES = {
    "screened": {"marker": ".", "color": "0.7", "linestyle": "none", "zorder": 1},
    "trained": {"marker": "D", "color": COLOURS[0], "linestyle": "none", "zorder": 3},
    "baseline": {"marker": "*", "color": COLOURS[1], "linestyle": "none", "markersize": 12},
}


def paths(
    surface: Callable[[Tensor, Tensor], Tensor],
    walks: Mapping[str, Tensor],
    *,
    x: tuple[float, float],
    y: tuple[float, float],
    every: int = 10,
) -> Picture:
    """The way of each optimizer over one surface: a panel for each, with contours of the surface.

    Lines of the contour are a factor of ten apart in height above the lowest point in sight, which
    a cross marks. The title gives the height at which a walk ends. What lies outside ``x`` and
    ``y`` is cut off.

    Args:
        surface: height at x and y, each a tensor of any one shape.
        walks: name -> points of shape (steps + 1, 2), from the start to the end.
        x, y: the part of the surface to show, from lowest to highest.
        every: a dot is drawn after this many steps, again and again.

    Raises:
        ValueError: no walk, a walk of another shape, an empty range, or ``every`` < 1.
    """
    if not walks:
        raise ValueError("there is no walk; give at least one, as name -> (steps + 1, 2) points")
    for name, walk in walks.items():
        if walk.ndim != 2 or walk.shape[1] != 2 or len(walk) == 0:
            raise ValueError(
                f"walk {name!r} has shape {tuple(walk.shape)}; give points as (steps + 1, 2)"
            )
    for name, (low, high) in {"x": x, "y": y}.items():
        if not low < high:
            raise ValueError(f"{name} runs from {low} to {high}; give the lower end first")
    if every < 1:
        raise ValueError(f"every is {every}; give 1 or more steps")
    across, up = torch.meshgrid(torch.linspace(*x, 401), torch.linspace(*y, 401), indexing="xy")
    heights = surface(across, up).detach()  # (401 values of y, 401 of x)
    lowest = torch.tensor([[across.flatten()[heights.argmin()], up.flatten()[heights.argmin()]]])
    heights = np.log10((heights - heights.min()).clamp(min=1e-9).numpy())
    levels = np.arange(-4, 1) + math.floor(heights.max())
    columns = min(4, len(walks))
    rows = -(-len(walks) // columns)
    with rc_context(_STYLE):
        picture = Picture(0.6 + 1.8 * columns, 0.9 + 1.7 * rows)
        grid = picture.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, (name, walk) in zip(grid, walks.items(), strict=False):
            points = walk.detach().cpu()
            axes.contour(across, up, heights, levels, colors="0.75", linewidths=0.8,
                         linestyles="solid")  # fmt: skip
            drawn = (points, points[every::every], lowest, points[:1], points[-1:])
            for which, looks in zip(drawn, _WALK_LOOKS, strict=True):
                axes.plot(which[:, 0], which[:, 1], **looks)
            end = surface(points[-1, 0], points[-1, 1]).item()
            axes.set_title(f"{name}: {end:.2g}", loc="left", fontsize=11)
            axes.set(xlim=x, ylim=y)
            axes.xaxis.set_major_locator(MaxNLocator(4, prune="both"))
        for axes in grid[len(walks) :]:
            axes.set_axis_off()
        for axes in grid[len(walks) - columns : len(walks)]:  # nothing stands below them
            axes.tick_params(labelbottom=True)
        picture.supxlabel("x", fontsize=11.5)
        picture.supylabel("y", fontsize=11.5)
        names = ("path", f"every {every} steps", "lowest point", "start", "end (title: its height)")
        picture.legend(
            grid[0].get_lines(), names, loc="outside upper left", ncols=5, frameon=False,
            handletextpad=0.3, columnspacing=1.2,
        )  # fmt: skip
    return picture


def timeline(traces: pd.DataFrame | Mapping[str, pd.DataFrame]) -> Picture:
    """What each rank of a pipeline did when: a bar for each piece of work, grey where it waited.

    A bar has the number of its micro-batch where there is room. On a rank with several stages, the
    later ones are paler.

    Args:
        traces: a trace of `workbench.parallel`, or several by name, drawn below each other on one
            axis of time; with the columns ``rank``, ``stage``, ``kind``, ``microbatch``,
            ``start_ms`` and ``end_ms``.

    Raises:
        ValueError: no trace, no work in it, or a column is missing.
    """
    traces = {"": traces} if isinstance(traces, pd.DataFrame) else dict(traces)
    if not traces or any(trace.empty for trace in traces.values()):
        raise ValueError("there is nothing to draw; give traces with at least one piece of work")
    for trace in traces.values():
        _check_columns(trace, ["rank", "stage", "kind", "microbatch", "start_ms", "end_ms"])
    traces = {name: _from_zero(trace) for name, trace in traces.items()}
    span = max(trace["end_ms"].max() for trace in traces.values())
    kinds = [kind for kind in _WORK if any(kind in set(t["kind"]) for t in traces.values())]
    ranks = [sorted(trace["rank"].unique()) for trace in traces.values()]
    with rc_context(_STYLE):
        picture = Picture(9, 1.1 + sum(0.35 + 0.3 * len(r) for r in ranks))
        heights = [len(r) for r in ranks]
        panels = picture.subplots(len(traces), 1, sharex=True, squeeze=False, height_ratios=heights)
        for axes, (name, trace), rows in zip(panels[:, 0], traces.items(), ranks, strict=True):
            axes.barh(range(len(rows)), trace["end_ms"].max(), height=0.86, color="0.9")
            for place, rank in enumerate(rows):
                _lane(axes, place, trace[trace["rank"] == rank], span)
            axes.set_yticks(range(len(rows)), rows)
            axes.set(ylabel="rank", xlim=(0, span), ylim=(len(rows) - 0.5, -0.5))
            axes.tick_params(axis="y", length=0)
            axes.set_title(name, loc="left", fontsize=11)
        panels[-1, 0].set_xlabel("time (ms)")
        keys = [Rectangle((0, 0), 1, 1, color=_WORK[kind]) for kind in kinds]
        picture.legend(
            [*keys, Rectangle((0, 0), 1, 1, color="0.9")], [*kinds, "waiting"],
            loc="outside upper right", ncols=5, frameon=False, handlelength=1.2,
        )  # fmt: skip
    return picture


def roofline(
    frame: pd.DataFrame,
    roofs: Roofs,
    by: str = "layer",
    *,
    dtypes: Sequence[str] = ("float32",),
    sources: Sequence[str] = ("memory",),
) -> Picture:
    """Speed of each operation against its arithmetic intensity, under the roofs of the machine.

    Args:
        frame: of `workbench.measure.roofline`; what does no FLOPs is left out.
        by: column whose values get a colour and a marker each.
        dtypes, sources: which flat and which sloping roofs to draw.

    Raises:
        ValueError: a column is missing, or nothing in the frame multiplies.
    """
    _check_columns(frame, ["flops", "intensity", "flops_s", by])
    points = frame[frame["flops"] > 0]
    if points.empty:
        raise ValueError("no operation of the frame multiplies; there is nothing to draw")
    right = max(points["intensity"].max(), *(roofs.ridge(t, s) for t in dtypes for s in sources))
    x = np.geomspace(points["intensity"].min() / 5, 4 * right, 200)  # with room for words
    with rc_context(_STYLE):
        picture = Picture(8, 4.8)
        axes = picture.subplots()
        for i, (name, rows) in enumerate(points.groupby(by, sort=False)):
            axes.plot(
                rows["intensity"], rows["flops_s"] / 1e9, MARKERS[i % len(MARKERS)], label=name,
                color=COLOURS[i % len(COLOURS)], markersize=6.5, markeredgecolor="white",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(x[0], x[-1]))
        for source in sources:
            highest = max(dtypes, key=lambda dtype: roofs.operations_s[dtype])
            axes.plot(x, roofs.attainable(x, highest, source) / 1e9, color=BLACK, linewidth=1.2)
        for dtype in dtypes:
            start = min(roofs.ridge(dtype, source) for source in sources)
            peak = roofs.operations_s[dtype] / 1e9
            axes.plot([start, x[-1]], [peak, peak], color=BLACK, linewidth=1.2)
            text = f"{dtype} {peak:,.0f}"
            axes.text(x[-1], peak * 1.06, text, ha="right", va="bottom", fontsize=10)
        for place, source in enumerate(sources):
            slope = roofs.bandwidth_bytes_s[source] / 1e9
            height = slope * (1.15 if place else 0.85)  # beside the line; the first one below it
            axes.text(
                1.1 * x[0], 1.1 * x[0] * height, f"{source} {slope:,.0f} GB/s", fontsize=10,
                rotation=math.degrees(math.atan(height)), rotation_mode="anchor",
                transform_rotates_text=True, va="bottom" if place else "top",
            )  # fmt: skip
        axes.set_xlabel("arithmetic intensity (FLOPs per byte)")
        axes.set_ylabel("speed (GFLOP/s; for int8, 10⁹ operations/s)")
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(frameon=True, framealpha=0.9, edgecolor="none", loc="lower right", fontsize=10)
    return picture


def cut(weight: Tensor, curve: pd.DataFrame, sparsity: float) -> Picture:
    """Which weights go when the smallest are pruned to ``sparsity``, and what that costs.

    Left, the spread of the weights, with those that go in grey; right, the ``score`` of ``curve``
    against its ``sparsity`` (one line for each ``criterion``, if there is such a column), with the
    chosen sparsity marked.

    Raises:
        ValueError: a column is missing, or the sparsity is not from 0 to 1.
    """
    _check_columns(curve, ["sparsity", "score"])
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}; give a share from 0 to 1")
    values = weight.detach().flatten().float().cpu().numpy()
    sizes = np.sort(np.abs(values))
    count = round(sparsity * len(values))
    threshold = float(sizes[count - 1]) if count else 0.0
    with rc_context(_STYLE):
        picture = Picture(9, 3.6)
        left, right = picture.subplots(1, 2)
        reach = float(sizes[int(0.999 * len(sizes))])
        edges = np.linspace(-reach, reach, 82)
        gone = (np.abs(values) <= threshold) & (count > 0)
        left.hist(
            [values[gone], values[~gone]], edges, stacked=True,
            color=[FAINT, COLOURS[0]], label=["set to zero", "kept"],
        )  # fmt: skip
        for side in (-threshold, threshold):
            left.axvline(side, color=GREY, linestyle="--", linewidth=1)
        left.set_xlabel("weight")
        left.set_ylabel("number of weights")
        left.legend(frameon=False)
        lines = curve.groupby("criterion", sort=False) if "criterion" in curve else [("", curve)]
        for i, (criterion, rows) in enumerate(lines):
            right.plot(
                rows["sparsity"],
                rows["score"],
                color=COLOURS[i],
                marker=MARKERS[i],
                label=criterion,
            )
        right.axvline(sparsity, color=GREY, linestyle="--", linewidth=1)
        right.set_xlabel("sparsity (%)")
        right.xaxis.set_major_formatter(FuncFormatter(_percent))
        right.set_ylabel(score_label(curve))
        if is_percent(curve):
            right.yaxis.set_major_formatter(FuncFormatter(_percent))
        if "criterion" in curve:
            right.legend(frameon=False)
    return picture


def maps(pictures: Sequence[tuple[str, str, np.ndarray]], columns: int) -> Picture:
    """What answers rest on: examples, and beside each its maps, row by row.

    A map is orange where a part speaks for the answer, violet where against it.

    Args:
        pictures: the name of an example, what is shown of it, and the values, (height, width), from
            -1 to 1; those that begin a row are the examples themselves.
        columns: pictures of one example.
    """
    rows = len(pictures) // columns
    with rc_context(_STYLE):
        picture = Picture(1.9 * columns, 0.4 + 1.9 * rows)
        grid = picture.subplots(rows, columns, squeeze=False).ravel()
        for place, (axes, (name, kind, values)) in enumerate(zip(grid, pictures, strict=True)):
            example = place % columns == 0
            axes.imshow(values, cmap="gray_r" if example else "PuOr_r", vmin=-1, vmax=1)
            if example:
                axes.images[0].set_clim(0, 1)
                axes.set_ylabel(name)
            if place < columns:
                axes.set_title(kind, fontsize=11.5)
            axes.set_xticks([])
            axes.set_yticks([])
    return picture


def layer(model: nn.Module, name: str, table: pd.DataFrame, sensitivity: pd.DataFrame) -> Picture:
    """One layer in four pictures: the spread of its weights, its singular values, what it loses at
    each level, and its share of bytes and work beside those of all other layers.

    Args:
        name: of the layer.
        table: one row for each layer, with ``layer``, ``byte_share`` and ``mac_share``.
        sensitivity: from `workbench.compress.sensitivity`, for one technique.

    Raises:
        ValueError: a column is missing, or a table has no such layer.
    """
    _check_columns(table, ["layer", "byte_share", "mac_share"])
    _check_columns(sensitivity, ["layer", "level", "drop"])
    for rows in (table, sensitivity):
        if name not in set(rows["layer"]):
            raise ValueError(
                f"layer is {name!r}; the table has {', '.join(rows['layer'].unique())}"
            )
    weight = layer_weight(model, name)
    with rc_context(_STYLE):
        picture = Picture(9, 5.6)
        (spread, spectrum), (loss, shares) = picture.subplots(2, 2)
        spread.hist(weight.flatten().numpy(), np.linspace(*_range(weight), 61), color=COLOURS[0])
        spread.set(xlabel="value of a weight", ylabel="weights")
        spread.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
        spread.set_title(_spread(weight).split(", ")[0], loc="left", fontsize=10)
        values = singular_values(weight)
        spectrum.plot(range(1, len(values) + 1), values, "o-", color=COLOURS[0], markersize=3.5)
        needed = rank_for(values, 0.9)
        spectrum.axvline(needed, color=GREY, linestyle="--", linewidth=1)
        title = f"{needed} of {len(values)} directions hold 90 % of the energy"
        spectrum.set_title(title, loc="left", fontsize=10)
        spectrum.set(xlabel="direction", ylabel="singular value", ylim=(0, None))
        spectrum.xaxis.set_major_locator(MaxNLocator(integer=True))
        percent = is_percent(sensitivity)
        for other, rows in sensitivity.groupby("layer", sort=False):
            chosen = other == name
            loss.plot(
                rows["level"].astype(float), rows["drop"], "^-" if chosen else "-",
                color=COLOURS[1] if chosen else FAINT, zorder=3 if chosen else 1,
            )  # fmt: skip
        loss.set(xlabel="level", ylabel="points lost" if percent else "score lost")
        if percent:
            loss.yaxis.set_major_formatter(FuncFormatter(_percent))
        loss.set_title("this layer alone; grey: each other layer", loc="left", fontsize=10)
        chosen = table["layer"] == name
        for rows, marker, colour in (
            (table[~chosen], "o", FAINT),
            (table[chosen], "D", COLOURS[1]),
        ):
            shares.plot(rows["mac_share"], rows["byte_share"], marker, color=colour, markersize=8)
        for axis in (shares.xaxis, shares.yaxis):
            axis.set_major_formatter(FuncFormatter(_percent))
        shares.margins(0.1)
        shares.set(xlabel="share of the multiplications (%)", ylabel="share of the bytes (%)")
        shares.set_title("grey: each other layer", loc="left", fontsize=10)
        picture.suptitle(name, x=0.01, ha="left", fontsize=12)
    return picture


def layer_weight(model: nn.Module, name: str) -> Tensor:
    """The largest weight of a layer, dense, with its output channels first."""
    found = dict(model.named_modules())[name]
    weights_of = [computed.weight_of(found, key) for key in computed.weight_names(found)]
    weight = max(weights_of, key=Tensor.numel).detach().float().cpu()
    return weight.transpose(0, 1) if computed.layer_type(found) in computed.TRANSPOSED else weight


def singular_values(weight: Tensor) -> np.ndarray:
    """Of the weight as a matrix, (output channels, inputs of each), the largest first."""
    rows = weight.flatten(1).double()  # (O, I)
    gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T  # the smaller of the two
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0).numpy()


def rank_for(values: np.ndarray, energy: float) -> int:
    """How many of the singular values hold this share of the sum of squares.

    >>> rank_for(np.array([2.0, 1.0, 1.0]), 0.8)
    2
    """
    held = np.cumsum(np.square(values))
    return int((held < energy * held[-1] * (1 - 1e-12)).sum()) + 1


def ledger(account: Ledger) -> Picture:
    """Where the bytes of a model file are: a bar for each tensor, the largest at the top, in parts
    by what the bytes are for, with the entropy of its values as a mark where that is known.

    Tensors that would be lost beside the largest share a bar.

    Raises:
        ValueError: the ledger has no rows.
    """
    rows = ledger_bars(account)
    largest = rows[["size_bytes", "entropy_bytes"]].max().max()
    scale, unit = next(
        (s, u) for s, u in ((1e-6, "MB"), (1e-3, "kB"), (1.0, "bytes")) if s == 1 or largest * s > 2
    )
    with rc_context(_STYLE):
        picture = Picture(8.5, 2 + 0.42 * len(rows))
        axes = picture.subplots()
        left = np.zeros(len(rows))
        for (kind, column), (colour, hatch) in zip(KIND_COLUMNS.items(), _KIND_LOOKS, strict=True):
            width = rows[column].to_numpy() * scale
            if width.any():
                axes.barh(
                    rows.index, width, left=left, color=colour, label=kind, height=0.68,
                    hatch=hatch, edgecolor="white", linewidth=0,
                )  # fmt: skip
            left += width
        marked = rows[rows["entropy_bytes"].notna()]
        if len(marked):
            axes.plot(
                marked["entropy_bytes"] * scale, marked.index, "|", color=BLACK, markersize=19,
                markeredgewidth=2, label="entropy of the values",
            )  # fmt: skip
        for place, row in rows.iterrows():
            reach = max(row["size_bytes"], np.nan_to_num(row["entropy_bytes"]))
            axes.annotate(
                row["label"], (reach * scale, place), xytext=(6, 0), textcoords="offset points",
                va="center", fontsize=10,
            )  # fmt: skip
        names = [name if len(name) <= 30 else f"…{name[-29:]}" for name in rows["tensor"]]
        axes.set_yticks(rows.index, names)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.margins(y=0.02)
        axes.set_xlim(0, 1.5 * largest * scale)  # room for the texts
        axes.set_xlabel(f"size in the file ({unit})")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        picture.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=10)
        title = f"{account.size_bytes:,} bytes, {account.bits_per_weight:.3g} bits a weight"
        axes.set_title(title, loc="left", fontsize=11.5)
    return picture


def ledger_bars(account: Ledger, most: int = 10) -> pd.DataFrame:
    """The rows behind `ledger`: at most ``most`` tensors and files, the largest first, then all
    others in one row. ``entropy_bytes`` is what the entropy of the values comes to."""
    if account.frame.empty:
        raise ValueError("the ledger has no rows; save a model that has tensors")
    rows = account.frame.sort_values("size_bytes", ascending=False, kind="stable")
    rows = rows.assign(entropy_bytes=rows["entropy_bits"] * rows["count"] / 8)
    few = rows["size_bytes"] < 0.01 * rows["size_bytes"].iloc[0]
    few |= np.arange(len(rows)) >= most
    numbers = ["count", "size_bytes", "entropy_bytes", *KIND_COLUMNS.values()]
    shown = rows.loc[~few, ["tensor", *numbers]]
    if few.any():
        sums = rows.loc[few, numbers].sum()
        if rows.loc[few & (rows["count"] > 0), "entropy_bytes"].isna().any():
            sums["entropy_bytes"] = math.nan
        others = pd.DataFrame([{"tensor": f"{few.sum():,} smaller ones", **sums}])
        shown = pd.concat([shown, others], ignore_index=True)
    bits = 8 * shown["size_bytes"] / shown["count"].where(shown["count"] > 0)
    texts = ["" if math.isnan(b) else f", {b:.3g} bits a weight" for b in bits]
    sizes = [f"{size:,.0f} B" for size in shown["size_bytes"]]
    shown["label"] = [size + text for size, text in zip(sizes, texts, strict=True)]
    return shown.reset_index(drop=True)


def code_tree(symbols: Mapping[object, float] | Sequence[object]) -> Picture:
    """The Huffman code of a few symbols as a tree: from the root to a symbol, its code is read off
    the branches. Beside each symbol stand its share of the data and its code.

    Args:
        symbols: how often each symbol occurs, or the data itself; 2 to 16 different symbols.

    Reference: Huffman (1952), "A method for the construction of minimum-redundancy codes".
    """
    leaves = code_words(symbols)
    depth = leaves["code"].str.len().max()
    with rc_context(_STYLE):
        picture = Picture(8, 1.3 + 0.36 * len(leaves))
        tree, table = picture.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
        places = dict(zip(leaves["code"], range(len(leaves)), strict=True))
        root = _branches(tree, "", places)
        tree.plot(0, root, "o", color=GREY, markersize=7)
        for x, text in zip(_TABLE, ("symbol", "share", "code"), strict=True):
            table.text(x, -0.9, text, va="center", color=GREY)
        for place, row in leaves.iterrows():
            bits = len(row["code"])
            tree.plot([bits, depth], [place, place], color=FAINT, linewidth=1, zorder=0)
            tree.plot(bits, place, "s", color=COLOURS[0], markersize=8)
            texts = (str(row["symbol"]), f"{100 * row['share']:.3g} %", row["code"])
            for x, text in zip(_TABLE, texts, strict=True):
                font = "monospace" if text is row["code"] else None
                table.text(x, place, text, va="center", family=font)
        tree.set_ylim(len(leaves) - 0.5, -1.3)
        tree.set_xticks(range(depth + 1))
        tree.set_xlabel("bits of the code")
        tree.set_yticks([])
        tree.spines[["left", "bottom"]].set_visible(False)
        table.set_axis_off()
        mean = (leaves["share"] * leaves["code"].str.len()).sum()
        bound = -(leaves["share"] * np.log2(leaves["share"])).sum()
        title = f"{mean:.3f} bits a symbol on average; the entropy is {bound:.3f}"
        picture.suptitle(title, x=0.01, ha="left", fontsize=11.5)
    return picture


def code_words(symbols: Mapping[object, float] | Sequence[object]) -> pd.DataFrame:
    """The rows behind `code_tree`, in the order of the codes: ``symbol``, ``share``, ``code``.

    Raises:
        ValueError: fewer than 2 or more than 16 symbols, or a symbol that occurs less than never.

    >>> code_words("abracadabra")["code"].tolist()
    ['0', '100', '101', '110', '111']
    """
    from workbench.storage import huffman

    if isinstance(symbols, Tensor):
        symbols = symbols.flatten().tolist()
    counts = symbols if isinstance(symbols, Mapping) else Counter(symbols)
    if any(not count >= 0 for count in counts.values()):
        raise ValueError(f"counts are {list(counts.values())}; give 0 or more")
    counts = {symbol: count for symbol, count in counts.items() if count > 0}
    if not 2 <= len(counts) <= _MOST_LEAVES:
        raise ValueError(
            f"{len(counts)} different symbols occur; a tree that can be read has 2 to "
            f"{_MOST_LEAVES}"
        )
    total = sum(counts.values())
    shares = np.array([count / total for count in counts.values()])
    whole = np.maximum(1, np.round(shares * 2**40)).astype(np.int64)  # shares as counts
    lengths = huffman.code_lengths(whole, limit=_MOST_LEAVES - 1)
    codes = huffman.canonical_codes(lengths)
    words = [f"{code:0{bits}b}" for code, bits in zip(codes, lengths, strict=True)]
    rows = pd.DataFrame({"symbol": list(counts), "share": shares, "code": words})
    return rows.sort_values("code", ignore_index=True)


def branches(frame: pd.DataFrame) -> Picture:
    """Who runs which branch of a model and when, if each FLOP takes as long as any other.

    The dashed line is where one worker alone would be done. Branches that are left to run one
    after another are hollow, with the reason of the first of them.

    Args:
        frame: from `workbench.parallel.graph_parallel.branches`.
    """
    _check_columns(frame, ["first", "flops", "worker", "starts_at", "left"])
    workers = range(max(2, frame["worker"].max() + 1))
    total = frame["flops"].sum() / 1e6
    with rc_context(_STYLE):
        picture = Picture(8, 1.6 + 0.6 * len(workers))
        axes = picture.subplots()
        for row in frame.itertuples():
            start, width = row.starts_at / 1e6, row.flops / 1e6
            face = "none" if row.left else COLOURS[row.worker % len(COLOURS)]
            axes.barh(
                row.worker, width, left=start, height=0.7, color=face,
                edgecolor=GREY if row.left else "white", label=_shortened(row.left, 60) or None,
            )  # fmt: skip
            if width > 0.012 * total * max(3, len(row.first)):  # it has room for its name
                colour = BLACK if row.left else "white"
                middle = dict(ha="center", va="center", fontsize=10, color=colour)
                axes.text(start + width / 2, row.worker, row.first, **middle)
        axes.axvline(total, color=GREY, linestyle=(0, (5, 3)), linewidth=1.2)
        axes.text(total, -0.55, "one worker ", ha="right", va="bottom", fontsize=10, color=GREY)
        axes.set_yticks(workers, [f"worker {worker}" for worker in workers])
        axes.set_ylim(len(workers) - 0.4, -0.9)
        axes.set_xlim(0, total * 1.02)
        axes.set_xlabel("work done before (million FLOPs)")
        handles, names = axes.get_legend_handles_labels()
        if handles:
            axes.legend(handles[:1], names[:1], frameon=False, loc="lower left")
    return picture


@functools.cache
def family(technique: str) -> str:
    """A technique without its settings: what shares a marker, and a tick box in the panel.

    >>> family("int8 static per channel"), family("4-bit per group of 32, affine weights")
    ('int8 static', 'k-bit weights')
    >>> family("pruned by magnitude (0.9, global) + fine-tuned (2 epochs)")
    'pruned by magnitude + fine-tuned'
    """
    if technique == "none":
        return UNTOUCHED
    settings = r"\s*\([^()]*\)| per (group of \d+|\w+)|, affine|: nothing \w+"
    return re.sub(r"\b\d+-bit\b", "k-bit", re.sub(settings, "", str(technique))).strip()


def baseline(frame: pd.DataFrame) -> pd.Series | None:
    """The row that the others are compared with: the one whose verdict says so.

    A frame without verdicts has its baseline first. None if the baseline is not there, or could
    not be measured.
    """
    rows = frame[frame["verdict"] == "baseline"] if "verdict" in frame else frame[:1]
    rows = rows[rows["score"].notna()]
    return rows.iloc[0] if len(rows) else None


def is_higher_better(frame: pd.DataFrame) -> bool:
    """Whether a higher score is better; yes, where the frame does not say."""
    known = frame["higher_is_better"].dropna() if "higher_is_better" in frame else []
    return bool(known.iloc[0]) if len(known) else True


def is_percent(frame: pd.DataFrame) -> bool:
    """Whether scores are proportions, shown in per cent: all from 0 to 1, and higher is better."""
    return is_higher_better(frame) and bool(
        pd.to_numeric(frame["score"]).dropna().between(0, 1).all()
    )


def score_label(frame: pd.DataFrame) -> str:
    """The metric's name with its unit or, where less is better, that it is so."""
    name = frame["metric"].iloc[0] if "metric" in frame else "score"
    if is_percent(frame):
        return f"{name} (%)"
    return name if is_higher_better(frame) else f"{name} (lower is better)"


COSTS = ("size_bytes", "latency_ms")
NEEDED = ("name", "technique", "simulated", "size_bytes", "score", "latency_ms")


def ready(frame: pd.DataFrame, needed: Collection[str] = NEEDED) -> pd.DataFrame:
    """The frame with numbers as numbers and ``simulated`` as true or false.

    Raises:
        ValueError: a needed column is missing, or there is no row.
    """
    _check_columns(frame, needed)
    numbers = {name: pd.to_numeric(frame[name]) for name in ("size_bytes", "score", "latency_ms")}
    return frame.assign(**numbers, simulated=frame["simulated"].eq(True))


def _check_columns(frame: pd.DataFrame, needed: Collection[str]) -> None:
    missing = [column for column in needed if column not in frame]
    if missing:
        raise ValueError(
            f"the frame has no column {', '.join(missing)}; it has {', '.join(map(str, frame))}. "
            "Make it with workbench.measure.compare"
        )
    if frame.empty:
        raise ValueError("the frame has no rows; give it at least one candidate")


def _percent(value: float, _position: int = 0) -> str:
    return f"{100 * value:.6g}"


def interval_columns(column: str) -> tuple[str, str]:
    """``score`` -> ``score_low``; ``latency_ms`` -> ``latency_low_ms``: the unit comes last."""
    stem, _, unit = column.rpartition("_")
    if unit in ("ms", "bytes"):
        return f"{stem}_low_{unit}", f"{stem}_high_{unit}"
    return f"{column}_low", f"{column}_high"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _looks(frame: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Colour and marker of each family of techniques, in the order of the frame."""
    families = dict.fromkeys(map(family, frame["technique"]))
    looks = {UNTOUCHED: (BLACK, "o")} if UNTOUCHED in families else {}
    for i, name in enumerate(f for f in families if f != UNTOUCHED):
        looks[name] = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    return looks


def _points(axes: Axes, measured: pd.DataFrame, kept: pd.DataFrame, cost: str) -> list[Bbox]:
    """Draw one panel without its names; give back where its bars are."""
    everything, measured = measured, measured[measured[cost].notna()]
    scale, unit = _unit(measured, cost)
    axes.set_xlabel(f"latency ({unit})" if unit == "ms" else f"size of the saved model ({unit})")
    if measured.empty:
        return []
    looks, crowd = _looks(everything), len(everything) > _CROWD
    kinds = [measured["technique"].map(family), measured["simulated"],
             measured["name"].isin(kept["name"])]  # fmt: skip
    bars = []
    for (name, simulated, lively), rows in measured.groupby(kinds, sort=False):
        colour, marker = looks[name]
        colour = colour if lively else FAINT
        for _, row in rows[: 0 if crowd else None].iterrows():
            intervals = _bars(axes, row, cost, scale, colour)  # of all, so that the axes never move
            bars += intervals if lively else []
        axes.plot(
            rows[cost] * scale, rows["score"], marker, color=colour, markersize=4 if crowd else 8,
            markerfacecolor="white" if simulated else colour,
            markeredgewidth=0.7 if crowd else 1.6, zorder=4 if lively else 2,
        )  # fmt: skip
    front = kept.set_index("name").loc[pareto_front(kept, cost) if len(kept) else []]
    xs, ys = (front[cost] * scale).tolist(), front["score"].tolist()
    if len(front) > 1:
        above = 5 if crowd else 1.5
        axes.step(xs, ys, where="post", color=GREY, linewidth=1.4, zorder=above)
        for i in range(len(xs) - 1):
            bars.append(Bbox([[xs[i], ys[i]], [xs[i + 1], ys[i]]]))
            bars.append(Bbox([[xs[i + 1], ys[i]], [xs[i + 1], ys[i + 1]]]))
    axes.margins(0.16, 0.14)
    spread = measured[cost].max() / measured[cost].min()
    if spread > 8:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread < 100 else (1, 3)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    if (reference := baseline(measured)) is not None:
        x, y = reference[cost] * scale, reference["score"]
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        axes.axhline(y, color=GREY, linestyle="--", linewidth=0.9, zorder=1)
        axes.axvline(x, color=GREY, linestyle="--", linewidth=0.9, zorder=1)
        bars += [Bbox([[left, y], [right, y]]), Bbox([[x, bottom], [x, top]])]
    return bars


def _unit(rows: pd.DataFrame, cost: str) -> tuple[float, str]:
    """What to multiply a cost by for its axis, and the unit it then has."""
    if cost == "latency_ms":
        return 1.0, "ms"
    return (1e-6, "MB") if rows[cost].max() >= 1e7 else (1e-3, "kB")


def _bars(axes: Axes, row: pd.Series, cost: str, scale: float, colour: str) -> list[Bbox]:
    """Draw the intervals of one candidate, where it has them."""
    x, y = row[cost] * scale, row["score"]
    cost_low, cost_high = (row.get(column, math.nan) for column in interval_columns(cost))
    low, high = (row.get(column, math.nan) for column in interval_columns("score"))
    style = {"color": colour, "linewidth": 1.1, "alpha": 0.7, "zorder": 1.8}
    bars = []
    if np.isfinite(low) and np.isfinite(high):
        axes.plot([x, x], [low, high], **style)
        bars.append(Bbox([[x, low], [x, high]]))
    if np.isfinite(cost_low) and np.isfinite(cost_high):
        axes.plot([cost_low * scale, cost_high * scale], [y, y], **style)
        bars.append(Bbox([[cost_low * scale, y], [cost_high * scale, y]]))
    return bars


def _names(
    axes: Axes,
    measured: pd.DataFrame,
    kept: pd.DataFrame,
    cost: str,
    winner: str | None,
    bars: list[Bbox],
) -> None:
    scale, _ = _unit(measured, cost)
    kept, measured = (rows[rows[cost].notna()] for rows in (kept, measured))
    if kept.empty:
        return
    reference = baseline(measured)
    first = [winner, None if reference is None else reference["name"]]
    if len(measured) > _CROWD:
        kept = measured = kept[kept["name"].isin(first)]
    else:
        first += pareto_front(kept, cost)
    order = sorted(
        kept.itertuples(), key=lambda row: first.index(row.name) if row.name in first else 99
    )
    texts = []
    for row in order:
        bold = row.name == winner
        x = getattr(row, cost) * scale
        texts.append(labels.Label(x, row.score, _shortened(row.name, 28), bold))
        if bold:
            axes.plot(
                x, row.score, "o", markersize=17, markerfacecolor="none", markeredgecolor=BLACK,
                markeredgewidth=1.6, zorder=5,
            )  # fmt: skip
    points = list(zip(measured[cost] * scale, measured["score"], strict=True))
    labels.place(axes, texts, avoid=points, bars=bars)


def _legend(picture: Picture, measured: pd.DataFrame) -> None:
    point = {"linestyle": "", "markersize": 8}
    handles = [
        Line2D([], [], color=colour, marker=marker, label=_shortened(name, 40), **point)
        for name, (colour, marker) in _looks(measured).items()
    ]
    if measured["simulated"].any():
        hollow = {"markerfacecolor": "white", "markeredgewidth": 1.6}
        handles.append(
            Line2D([], [], color=GREY, marker="o", label="hollow: simulated", **point, **hollow)
        )
    if baseline(measured) is not None:
        handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=0.9, label="baseline"))
    if len(measured) > 1:
        handles.append(Line2D([], [], color=GREY, linewidth=1.4, label="Pareto front"))
    place = {"loc": "outside upper center", "frameon": False, "handletextpad": 0.4}
    for columns in range(6, 0, -1):
        legend = picture.legend(handles=handles, ncols=columns, columnspacing=1.4, **place)
        if columns == 1 or legend.get_window_extent().width < 0.98 * picture.bbox.width:
            return
        legend.remove()


def _from_zero(trace: pd.DataFrame) -> pd.DataFrame:
    start = trace["start_ms"].min()
    return trace.assign(start_ms=trace["start_ms"] - start, end_ms=trace["end_ms"] - start)


def _lane(axes: Axes, place: int, work: pd.DataFrame, span: float) -> None:
    """The bars of one rank, with their numbers where 7.5 inches for all of ``span`` leave room."""
    stages = sorted(work["stage"].unique())
    for row in work.itertuples():
        width = row.end_ms - row.start_ms
        depth = stages.index(row.stage) / len(stages)
        axes.barh(
            place, width, left=row.start_ms, height=0.86, color=_WORK[row.kind],
            alpha=1 - 0.6 * depth, edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        number = str(row.microbatch)
        if 7.5 * width / span > 0.05 + 0.08 * len(number):
            axes.text(
                row.start_ms + width / 2, place, number, ha="center", va="center_baseline",
                fontsize=9, color="white" if depth == 0 else BLACK,
            )  # fmt: skip


_WALK_LOOKS = (
    {"color": COLOURS[0], "linewidth": 1.2},
    {"color": COLOURS[0], "marker": "o", "markersize": 3.5, "linestyle": "none"},
    {"color": BLACK, "marker": "+", "markersize": 11, "linestyle": "none", "markeredgewidth": 1.5},
    {"color": BLACK, "marker": "s", "markersize": 7, "linestyle": "none", "fillstyle": "none"},
    {"color": COLOURS[1], "marker": "*", "markersize": 12, "linestyle": "none"},
)
_WORK = {
    "forward": COLOURS[0], "backward": COLOURS[1], "input gradient": COLOURS[1],
    "weight gradient": COLOURS[2],
}  # fmt: skip
_MOST_LEAVES = 16
# By kind of bytes: what is told apart by colour is told apart by hatching too.
_KIND_LOOKS = (
    (COLOURS[0], ""), (COLOURS[1], "///"), (COLOURS[2], "..."), (COLOURS[3], "\\\\\\"),
    (COLOURS[4], "xxx"), (GREY, ""),
)  # fmt: skip


_TABLE = (0, 0.33, 0.66)  # where the columns beside a tree begin


def _branches(axes: Axes, code: str, places: Mapping[str, float]) -> float:
    """Draw what hangs from the node that ``code`` leads to; give back its height."""
    if code in places:
        return places[code]
    heights = [_branches(axes, code + bit, places) for bit in "01"]
    middle = sum(heights) / 2
    for bit, height in zip("01", heights, strict=True):
        x = len(code)
        axes.plot([x, x, x + 1], [middle, height, height], color=GREY, linewidth=1.4, zorder=1)
        axes.text(x + 0.5, height - 0.06, bit, ha="center", va="bottom", color=COLOURS[1])
    return middle


def _largest_weight(model: nn.Module) -> str:
    found = [(weight.numel(), name) for name, weight in computed.weights(model) if weight.ndim > 1]
    if not found:
        raise ValueError("the model has no weight of two or more dimensions; pass a tensor")
    return max(found)[1]


def _values(source: nn.Module | Tensor, layer: str | None) -> Tensor:
    if isinstance(source, Tensor):
        weight = source.detach()
    elif isinstance(source, nn.Module):
        known = dict(computed.weights(source))
        weight = known.get(layer, known.get(f"{layer}.weight"))
        if weight is None:
            raise ValueError(f"layer is {layer!r}; this model has {', '.join(known)}")
    else:
        raise TypeError(f"expected a torch.nn.Module or a Tensor, not a {type(source).__name__}")
    return weight.float().cpu()


def _range(weight: Tensor) -> tuple[float, float]:
    low, high = weight.min().item(), weight.max().item()
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _spread(weight: Tensor) -> str:
    distinct = len(weight.unique())
    text = f"{distinct:,} different values"
    if weight.ndim > 1:
        most = max(len(channel.unique()) for channel in weight)
        text += f", at most {most:,} in one output channel"
    zeros = (weight == 0).float().mean().item()
    return f"{text}, {zeros:.0%} zeros" if zeros > 0.005 else text


def _changes(
    task: Task, before: Callable[..., Tensor], after: Callable[..., Tensor], split: str
) -> tuple[pd.DataFrame, dict[int, np.ndarray]]:
    """Rows of `answer_changes`, and the images of the broken ones by row number."""
    rows, images, start = [], {}, 0
    for inputs, target, *outputs in paired_outputs(before, after, task, split):
        old, new = (_answers(output, target) for output in outputs)
        for i in (old != new).nonzero().flatten().tolist():
            right = target[i].item()
            was, now = old[i].item(), new[i].item()
            kind = kind_of_change(right, was, now)
            if kind == "broken" and (image := _image(inputs[0][i])) is not None:
                images[len(rows)] = image
            rows.append((start + i, *(class_name(task, c) for c in (right, was, now)), kind))
        start += len(target)
    return pd.DataFrame(rows, columns=["index", "target", "before", "after", "kind"]), images


def _answers(output: Tensor, target: Tensor) -> Tensor:
    if output.ndim != 2 or target.ndim != 1:
        raise ValueError(
            f"outputs of shape {tuple(output.shape)} for targets of shape {tuple(target.shape)}; "
            "changes of answers need one class per example: (batch, classes) and (batch,)"
        )
    return output.argmax(-1)


def _image(x: Tensor) -> np.ndarray | None:
    """(1, H, W) -> (H, W) and (3, H, W) -> (H, W, 3) scaled to 0..1; None for anything else."""
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        return None
    x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-9)
    return (x[0] if x.shape[0] == 1 else x.movedim(0, -1)).cpu().numpy()


def _classes(task: Task, changes: pd.DataFrame) -> list:
    """The classes of the matrix: all of a short list, else the twelve that changed most."""
    answers = pd.concat([changes["before"], changes["after"]])
    if 0 < len(task.labels) <= 12:
        return list(task.labels)
    return sorted(answers.value_counts().index[:12])


def _matrix(axes: Axes, changes: pd.DataFrame, classes: list) -> None:
    counts = pd.crosstab(changes["before"], changes["after"])
    counts = counts.reindex(index=classes, columns=classes, fill_value=0).to_numpy()
    axes.imshow(np.where(counts > 0, counts, np.nan), cmap="Blues", vmin=0)
    for row, column in zip(*counts.nonzero(), strict=True):
        count = counts[row, column]
        dark = count > 0.6 * counts.max()
        axes.text(column, row, count, ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("answer after")
    axes.set_ylabel("answer before")
    axes.set_title("examples that changed their answer", fontsize=10, loc="left")


def _summary(axes: Axes, changes: pd.DataFrame) -> None:
    counts = changes["kind"].value_counts().reindex(["fixed", "broken", "other"], fill_value=0)
    texts = ("wrong → right", "right → wrong", "wrong → other wrong")
    colours = (COLOURS[2], COLOURS[1], GREY)
    bars = axes.barh(texts, counts, color=colours, height=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("examples")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    net = int(counts["fixed"] - counts["broken"])
    axes.set_title(f"{len(changes):,} changed, net {net:+,} right", fontsize=10, loc="left")
