"""What a candidate must keep to, and which of those that do is the best.

`workbench.explore.search` and `workbench.explore.advise` take the same `Limits` as the panels.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd

from workbench.explore import plots

Objective = Literal["fastest", "smallest", "most accurate"]
OBJECTIVES = ("fastest", "smallest", "most accurate")


@dataclass(frozen=True)
class Limits:
    """What a candidate must keep to; the defaults let everything through.

    ``techniques`` are families (see `workbench.explore.plots.family`), None for all.
    ``score_lost`` is how much worse than the baseline a score may be, in units of the metric:
    0.01 is one point of accuracy. ``simulated`` says whether candidates pass that no kernel runs.
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
