"""Names beside points, placed so that they do not cover each other or the points.

Positions are tried in rings around each point; the first free one is taken, in pixels of the
figure as it is laid out. Offsets are stored in typographic points, so they hold at any resolution.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.transforms import Bbox

_RINGS_POINTS = (7, 12, 18, 26, 36, 48, 62)
_LEADER_FROM_POINTS = 18  # from this distance on, a thin line ties the name to its point
_ANGLES_DEGREES = (0, 180, 45, 135, 315, 225, 90, 270, 20, 160, 340, 200)
_MARKER_POINTS = 5  # half the width of the square kept free around a point

_CORNER = {"left": 0, "bottom": 0, "center": 0.5, "right": 1, "top": 1}


@dataclass(frozen=True)
class Label:
    """``text`` beside the point (``x``, ``y``) in data coordinates."""

    x: float
    y: float
    text: str
    bold: bool = False


def place(
    axes: Axes,
    labels: Sequence[Label],
    *,
    avoid: Sequence[tuple[float, float]] = (),
    bars: Iterable[Bbox] = (),
    size_points: float = 10.5,
) -> list[str]:
    """Write the labels on ``axes`` and return the texts for which there was no room.

    Args:
        labels: most important first; a later one gives way.
        avoid: points in data coordinates that stay uncovered, besides the labelled ones.
        bars: thin things in data coordinates, covered only when there is no other place.

    Limits and layout of the figure must be final.
    """
    pixels_per_point = axes.figure.dpi / 72
    to_pixels = axes.transData.transform
    margin = _MARKER_POINTS * pixels_per_point
    points = [to_pixels(p) for p in (*avoid, *((label.x, label.y) for label in labels))]
    taken = [Bbox([[x - margin, y - margin], [x + margin, y + margin]]) for x, y in points]
    thin = [Bbox(to_pixels(bar)) for bar in bars]
    inside = axes.get_window_extent()
    texts, left_out = [], []
    for label in labels:
        width, height = _text_size(label, size_points * pixels_per_point)
        best = None
        for radius in _RINGS_POINTS[label.bold :]:  # a bold one has a ring around its point
            for angle in _ANGLES_DEGREES:
                distance = radius * pixels_per_point
                dx, dy = (distance * f(math.radians(angle)) for f in (math.cos, math.sin))
                x, y = to_pixels((label.x, label.y))
                box = _box(x, y, dx, dy, width, height)
                if not _contains(inside, box) or any(map(box.overlaps, taken)):
                    continue
                leader = _leader(x, y, dx, dy) if radius >= _LEADER_FROM_POINTS else []
                crossed = sum(any(map(text.overlaps, leader)) for text in texts)
                cost = radius + 15 * sum(map(box.overlaps, thin)) + 60 * crossed
                if best is None or cost < best[0]:
                    best = cost, dx, dy, box, leader
        if best is None:
            left_out.append(label.text)
            continue
        _, dx, dy, box, leader = best
        taken.append(box)
        texts.append(box)
        thin += leader
        ha, va = _side(dx, "left", "right"), _side(dy, "bottom", "top")
        line = {
            "arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4,
            "relpos": (_CORNER[ha], _CORNER[va]),
        }  # fmt: skip
        axes.annotate(
            label.text,
            (label.x, label.y),
            (dx / pixels_per_point, dy / pixels_per_point),
            textcoords="offset points",
            ha=ha,
            va=va,
            fontsize=size_points,
            fontweight="bold" if label.bold else "normal",
            arrowprops=line if leader else None,
            path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
            parse_math=False,
            zorder=6,
        )
    return left_out


def _text_size(label: Label, size_pixels: float) -> tuple[float, float]:
    font = FontProperties(weight="bold" if label.bold else "normal")
    # A little wider than the outline: hinting at low resolution spreads letters.
    width = TextPath((0, 0), label.text.replace("$", r"\$"), size_pixels, prop=font)
    return width.get_extents().width * 1.05 + 2, size_pixels * 1.25


def _box(x: float, y: float, dx: float, dy: float, width: float, height: float) -> Bbox:
    """The text's box in pixels when it is offset from the point (x, y) by (dx, dy)."""
    left = {"left": x + dx, "right": x + dx - width, "center": x + dx - width / 2}
    bottom = {"bottom": y + dy, "top": y + dy - height, "center": y + dy - height / 2}
    return Bbox.from_bounds(
        left[_side(dx, "left", "right")], bottom[_side(dy, "bottom", "top")], width, height
    )


def _leader(x: float, y: float, dx: float, dy: float) -> list[Bbox]:
    """The line from the point (x, y) to its text at (dx, dy) from it, as a row of dots."""
    return [Bbox.from_bounds(x + t / 10 * dx, y + t / 10 * dy, 0, 0) for t in range(3, 11)]


def _side(offset: float, positive: str, negative: str) -> str:
    return "center" if abs(offset) < 1e-6 else positive if offset > 0 else negative


def _contains(outer: Bbox, inner: Bbox) -> bool:
    return (
        outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and
        outer.y0 <= inner.y0 and inner.y1 <= outer.y1
    )  # fmt: skip
