"""How sure one can be of a score, and whether two models really differ.

Scores are one number per example; their mean is the metric. Both tests take the examples as
independent of one another, which windows of one long text are only roughly.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats
from torch import Tensor

Scores = Tensor | Sequence[float] | np.ndarray


def interval(scores: Scores, proportion: bool) -> tuple[float, float]:
    """95 % interval of the mean of ``scores``, one per example.

    Wilson's interval where the scores are 0 or 1 (``proportion``), which stays right for small
    tests and near 0 and 1; Student's otherwise, which is NaN for a single example.

    Raises:
        ValueError: no scores, a NaN among them, or a proportion that is not all 0 and 1.

    Reference: Wilson (1927), "Probable inference, the law of succession, and statistical
    inference"; Brown, Cai and DasGupta (2001), "Interval estimation for a binomial proportion".

    >>> interval([1.0] * 90 + [0.0] * 10, proportion=True)  # a test set of 100 says little
    (0.8256..., 0.9447...)
    """
    scores = _checked(scores, proportion)
    if proportion:
        successes = int(scores.sum())
        found = stats.binomtest(successes, len(scores)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    if len(scores) == 1:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, len(scores) - 1) * scores.std(ddof=1) / math.sqrt(len(scores))
    return float(scores.mean() - half), float(scores.mean() + half)


def paired_p_value(before: Scores, after: Scores, proportion: bool) -> float:
    """Probability of a difference at least this large if both models were equally good.

    ``before`` and ``after`` score the same examples in the same order. McNemar's exact test for
    scores of 0 and 1, which looks only at the examples whose answer changed; Student's paired test
    otherwise. 1.0 where nothing changed.

    Raises:
        ValueError: scores of different lengths, or that `interval` would refuse.

    Reference: McNemar (1947), "Note on the sampling error of the difference between correlated
    proportions or percentages"; Dietterich (1998), "Approximate statistical tests for comparing
    supervised classification learning algorithms".

    >>> paired_p_value([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], proportion=True)
    0.0625
    """
    before, after = _checked(before, proportion), _checked(after, proportion)
    if len(before) != len(after):
        raise ValueError(
            f"the scores are of {len(before)} and {len(after)} examples; score both models on the "
            "same examples in the same order"
        )
    if np.array_equal(before, after):
        return 1.0
    if proportion:
        gained, lost = int((after > before).sum()), int((after < before).sum())
        return float(stats.binomtest(gained, gained + lost).pvalue)
    change = after - before
    if np.ptp(change) == 0:  # the same change everywhere: no spread to test against
        return 0.0 if len(change) > 1 else math.nan
    return float(stats.ttest_1samp(change, 0).pvalue)


def several_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a metric over runs that differ only in their seed.

    >>> several_seeds([0.25, 0.5, 0.75])
    (0.5, 0.25)
    """
    if len(values) < 2:
        raise ValueError(f"there is {len(values)} value; give 2 or more, one for each seed")
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(values.std(ddof=1))


def over_seeds(frame: pd.DataFrame, by: Sequence[str], value: str = "score") -> pd.DataFrame:
    """Runs that differ only in their seed, as one row for each combination of the columns ``by``.

    Returns those columns, then ``value`` (the mean), ``value_sd`` (standard deviation, NaN for a
    single run), ``value_low`` and ``value_high`` (mean minus and plus one SD), and ``count``.

    >>> runs = pd.DataFrame({"bits": [2, 2, 2], "seed": [0, 1, 2], "score": [0.25, 0.5, 0.75]})
    >>> over_seeds(runs, ["bits"])
       bits  score  score_sd  score_low  score_high  count
    0     2    0.5      0.25       0.25        0.75      3
    """
    runs = frame.groupby([*by], sort=False)[value]
    table = runs.agg(["mean", "std", "count"]).reset_index()
    spread = table["std"].fillna(0)
    return table[[*by]].assign(
        **{
            value: table["mean"],
            f"{value}_sd": table["std"],
            f"{value}_low": table["mean"] - spread,
            f"{value}_high": table["mean"] + spread,
            "count": table["count"],
        }
    )


def _checked(scores: Scores, proportion: bool) -> np.ndarray:
    scores = np.asarray(scores, dtype=float).ravel()
    if len(scores) == 0:
        raise ValueError("there are no scores; score at least one example")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN")
    if proportion and not np.isin(scores, (0, 1)).all():
        wrong = scores[~np.isin(scores, (0, 1))][0]
        raise ValueError(f"a score is {wrong}, but those of a proportion are 0 or 1")
    return scores
