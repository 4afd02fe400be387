"""How long one call takes, and whether one candidate is faster than another.

On a shared machine the time of a call drifts by tens of per cent within a second, in bursts. All
candidates are therefore measured in turn, round after round, and compared round by round: what
slows a whole round cancels in its ratio. Intervals come from a bootstrap that draws runs of
neighbouring rounds, since a burst spans several: the circular block bootstrap of Politis and
Romano (1992), with blocks of the cube root of the number of rounds (Hall, Horowitz and Jing, 1995).
"""

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.deploy.runtimes import Predictor

REPEATS = 100
# Every interval of a speed-up is widened by what no resampling of one run can see: the "type B"
# part of an uncertainty (JCGM 100:2008). Where the weights of two copies of one model lie in memory
# makes one of them faster by 2 % (standard deviation over 120 pairs; see Mytkowicz et al., 2009,
# "Producing wrong data without doing anything obviously wrong!"), and the machine drifts from one
# run to the next. Without it, one in five pairs of runs gave intervals that did not overlap.
SYSTEMATIC = 0.05
_SHORTEST_SAMPLE_MS = 4.0  # far above the clock's resolution, and long enough to average bursts
_RESAMPLES = 2000


@dataclass(frozen=True)
class Latency:
    """What `measure_latency` found.

    ``samples_ms`` has one row per round and one column per candidate. ``summary`` has one row per
    candidate: ``latency_ms`` (median), ``latency_low_ms`` and ``latency_high_ms`` (its 95 %
    interval), ``latency_p95_ms``, ``speedup`` with ``speedup_low`` and ``speedup_high`` (95 %
    interval), ``verdict``, and ``error`` ("" where there was none).
    """

    samples_ms: pd.DataFrame
    summary: pd.DataFrame


def measure_latency(
    predictors: Mapping[str, Predictor],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    repeats: int = REPEATS,
    warmup: int = 5,
    threads: int = 1,
    seed: int = 0,
    baseline: str | None = None,
    progress: bool = False,
) -> Latency:
    """Time one call of each predictor on ``inputs``, interleaved, in this process.

    Every round measures each candidate once, in a new order. A sample is one call, or the mean of
    as many calls as fill 4 ms where a call is shorter. The speed-up is a mean over the rounds of
    the baseline's time divided by the candidate's in the same round (of the logarithms, without
    the lowest and the highest quarter); its interval is the bootstrap's, 5 % wider on either side
    for what one run cannot see.

    Args:
        predictors: name -> predictor; its inputs are moved to its device before the clock starts.
        repeats: number of rounds, at least 10.
        warmup: calls of each candidate before the first round.
        threads: torch's intra-op threads during the measurement; restored afterwards.
        seed: of the order of the candidates and of the bootstrap.
        baseline: name of the candidate that the others are compared with; the first by default.

    A candidate that raises is left out from then on; its row holds NaN and the error.

    Raises:
        ValueError: no candidates, an unknown baseline, or a count out of range.

    Shown in notebook 01.
    """
    baseline = choose_baseline(predictors, baseline)
    for given, value, least in (("repeats", repeats, 10), ("warmup", warmup, 1)):
        if value < least:
            raise ValueError(f"{given} is {value}; give {least} or more")
    if threads < 1:
        raise ValueError(f"threads is {threads}; give 1 or more")
    inputs = (inputs,) if torch.is_tensor(inputs) else tuple(inputs)
    samples = {name: np.full(repeats, np.nan) for name in predictors}
    errors: dict[str, str] = {}
    with _steady(threads):
        ready = {}
        for name, predictor in predictors.items():
            try:
                moved = tuple(x.to(predictor.device) for x in inputs)
                ready[name] = (predictor, moved, _warm_up(predictor, moved, warmup))
            except Exception as error:
                errors[name] = describe(error)
        order = random.Random(seed)
        for r in tqdm(range(repeats), desc="latency", unit="round", disable=not progress):
            for name in order.sample(sorted(ready), len(ready)):
                try:
                    samples[name][r] = _sample_ms(*ready[name])
                except Exception as error:
                    errors[name] = describe(error)
                    del ready[name]
    for name in errors:
        samples[name][:] = np.nan
    rows = [
        _row(name, samples, baseline, predictor.simulated, errors.get(name, ""), seed)
        for name, predictor in predictors.items()
    ]
    return Latency(pd.DataFrame(samples), pd.DataFrame(rows, index=pd.Index(samples, name="name")))


def verdict(speedup: float, low: float, high: float, *, simulated: bool = False) -> str:
    """Say in words what a speed-up and its 95 % interval mean.

    A difference counts when 1 lies outside the interval. What is simulated is never called
    faster: it has no kernel of its own that could be.

    >>> verdict(2.41, 2.3, 2.5), verdict(0.5, 0.45, 0.55), verdict(1.1, 0.9, 1.3)
    ('2.4 times faster', '2.0 times slower', 'no measurable difference')
    """
    if math.isnan(speedup):
        return ""
    if low <= 1 <= high:
        words = "no measurable difference"
    elif speedup < 1:
        words = f"{_times(1 / speedup)} slower"
    elif simulated:
        words = f"took {1 / speedup:.2f} of the baseline's time"
    else:
        words = f"{_times(speedup)} faster"
    return f"simulated ({words})" if simulated else words


def describe(error: Exception) -> str:
    """One line that says what went wrong, as it stands in an ``error`` cell."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def choose_baseline(candidates: Mapping[str, object], baseline: str | None) -> str:
    """The named baseline after a check that it is there; the first candidate by default."""
    if not candidates:
        raise ValueError("there is nothing to measure; give at least one name -> candidate")
    if baseline is None:
        return next(iter(candidates))
    if baseline not in candidates:
        raise ValueError(f"baseline is {baseline!r}; choose from {list(candidates)}")
    return baseline


@contextmanager
def _steady(threads: int) -> Iterator[None]:
    """A fixed number of threads, and no garbage collection in the middle of a sample."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def _warm_up(predictor: Predictor, inputs: tuple[Tensor, ...], warmup: int) -> int:
    """Call until caches are warm and code is compiled; return the number of calls per sample."""
    for _ in range(warmup):
        predictor.predict(*inputs)
    call_ms = min(_sample_ms(predictor, inputs, 1) for _ in range(3))
    return max(1, math.ceil(_SHORTEST_SAMPLE_MS / call_ms))


def _sample_ms(predictor: Predictor, inputs: tuple[Tensor, ...], calls: int) -> float:
    device = torch.device(predictor.device)
    if device.type == "cuda":
        # The host returns before the device is done: let the device keep the time.
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                predictor.predict(*inputs)
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / calls
    start_ns = time.perf_counter_ns()
    for _ in range(calls):
        predictor.predict(*inputs)
    return (time.perf_counter_ns() - start_ns) / calls / 1e6


def _row(
    name: str,
    samples: dict[str, np.ndarray],
    baseline: str,
    simulated: bool,
    error: str,
    seed: int,
) -> dict:
    own_ms = samples[name]
    low_ms, high_ms = _interval(own_ms, np.median, seed)
    logarithms = np.log(samples[baseline] / own_ms)
    speedup = math.exp(_middle_mean(logarithms))
    if name == baseline:
        low = high = speedup  # 1, or NaN where it failed
        words = "" if math.isnan(speedup) else "baseline"
    else:
        low, high = np.exp(_interval(logarithms, _middle_mean, seed)).tolist()
        low, high = low / (1 + SYSTEMATIC), high * (1 + SYSTEMATIC)
        words = verdict(speedup, low, high, simulated=simulated)
    return {
        "latency_ms": float(np.median(own_ms)),
        "latency_low_ms": low_ms,
        "latency_high_ms": high_ms,
        "latency_p95_ms": float(np.quantile(own_ms, 0.95)),
        "speedup": speedup,
        "speedup_low": low,
        "speedup_high": high,
        "verdict": words,
        "error": error,
    }


def _middle_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean without the lowest and the highest quarter: deaf to bursts like a median, and steadier.

    Between two copies of one model on a machine with three times too much to do, its standard
    deviation was 3.7 % where the median's was 5.0 %.
    """
    quarter = values.shape[axis] // 4
    return np.sort(values, axis).take(range(quarter, values.shape[axis] - quarter), axis).mean(axis)


def _interval(
    values: np.ndarray, statistic: Callable[..., np.ndarray], seed: int
) -> tuple[float, float]:
    """95 % interval of a statistic by a circular block bootstrap; NaN where the values are."""
    rounds = len(values)
    length = round(rounds ** (1 / 3))
    starts = np.random.default_rng(seed).integers(
        rounds, size=(_RESAMPLES, math.ceil(rounds / length))
    )
    picked = (starts[:, :, None] + np.arange(length)) % rounds  # (resamples, blocks, length)
    resampled = values[picked.reshape(_RESAMPLES, -1)[:, :rounds]]  # (resamples, rounds)
    low, high = np.quantile(statistic(resampled, axis=1), [0.025, 0.975])
    return float(low), float(high)


def _times(factor: float) -> str:
    digits = 2 if factor < 1.2 else 1 if factor < 10 else 0
    return f"{factor:.{digits}f} times"
