"""Timing on a clock of our own where exactness counts, on the real one where noise is the point."""

import doctest
import gc
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench import models
from workbench.deploy.runtimes import Predictor, prepare
from workbench.measure import latency
from workbench.measure.latency import measure_latency, verdict

X = torch.rand(1, 1, 28, 28)


class Scripted(Predictor):
    """Takes the milliseconds that ``cost_ms(call)`` says, on a clock that only it moves."""

    def __init__(self, clock, cost_ms, log=None, name=""):
        super().__init__("cpu")
        self.clock, self.cost_ms, self.log, self.name, self.calls = clock, cost_ms, log, name, 0

    def predict(self, *inputs):
        self.calls += 1
        if self.log is not None:
            self.log.append(self.name)
        self.clock[0] += int(self.cost_ms(self.calls) * 1e6)
        return inputs[0]


@pytest.fixture
def clock(monkeypatch):
    now = [0]
    monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: now[0])
    return now


def test_medians_and_ratios_of_known_times(clock):
    found = measure_latency(
        {"base": Scripted(clock, lambda _: 10), "fast": Scripted(clock, lambda _: 4)}, X
    )
    fast = found.summary.loc["fast"]
    assert fast.latency_ms == fast.latency_low_ms == fast.latency_p95_ms == 4
    assert fast.speedup == pytest.approx(2.5)
    assert (fast.speedup_low, fast.speedup_high) == pytest.approx((2.5 / 1.05, 2.5 * 1.05))
    assert fast.verdict == "2.5 times faster"
    base = found.summary.loc["base"]
    assert (base.speedup, base.speedup_low, base.verdict) == (1, 1, "baseline")
    assert found.samples_ms.shape == (latency.REPEATS, 2)


def test_noise_common_to_a_round_cancels(clock):
    noise = np.random.default_rng(0).lognormal(0, 1, size=10_000)
    found = measure_latency(
        {
            "base": Scripted(clock, lambda call: 20 * noise[call]),
            "slow": Scripted(clock, lambda call: 24 * noise[call]),
        },
        X,
    )
    # One call a sample, so that call n of both falls into the same round.
    slow = found.summary.loc["slow"]
    assert slow.speedup == pytest.approx(20 / 24, rel=1e-3)
    assert slow.speedup_high / slow.speedup_low == pytest.approx(1.05**2, rel=1e-3)
    assert slow.latency_high_ms / slow.latency_low_ms > 1.3


def test_each_round_measures_each_candidate_once_in_changing_order(clock):
    log = []
    predictors = {name: Scripted(clock, lambda _: 5, log, name) for name in "abc"}
    measure_latency(predictors, X, repeats=30, warmup=1)
    rounds = np.array(log[-90:]).reshape(30, 3)
    assert all(sorted(row) == ["a", "b", "c"] for row in rounds.tolist())
    assert len(set(map(tuple, rounds.tolist()))) == 6  # every order occurs


def test_short_calls_are_bundled(clock):
    predictor = Scripted(clock, lambda _: 0.5)
    found = measure_latency({"a": predictor}, X, repeats=10, warmup=1)
    assert found.summary.latency_ms["a"] == 0.5
    assert predictor.calls == 1 + 3 + 10 * 8  # 8 calls of 0.5 ms fill 4 ms


def test_a_failing_candidate_is_left_out_and_says_why(clock):
    def fails(call):
        return 5 if call < 20 else 1 / 0

    predictors = {"base": Scripted(clock, lambda _: 10), "bad": Scripted(clock, fails)}
    summary = measure_latency(predictors, X).summary
    assert summary.error["bad"] == "ZeroDivisionError: division by zero"
    assert math.isnan(summary.latency_ms["bad"])
    assert summary.verdict["bad"] == ""
    assert summary.latency_ms["base"] == 10


def test_without_its_baseline_there_are_no_ratios(clock):
    predictors = {"bad": Scripted(clock, lambda _: 1 / 0), "good": Scripted(clock, lambda _: 5)}
    good = measure_latency(predictors, X).summary.loc["good"]
    assert good.latency_ms == 5
    assert math.isnan(good.speedup)
    assert good.verdict == ""


def test_threads_and_garbage_collection_are_as_before():
    seen = []

    class Looking(Predictor):
        def predict(self, *inputs):
            seen.append((torch.get_num_threads(), gc.isenabled()))
            time.sleep(0.001)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measure_latency({"a": Looking()}, X, repeats=10, threads=1)
        assert set(seen) == {(1, False)}
        assert (torch.get_num_threads(), gc.isenabled()) == (2, True)
    finally:
        torch.set_num_threads(before)


def test_interrupting_passes_through_and_restores(clock):
    def interrupt(call):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_latency({"a": Scripted(clock, interrupt)}, X)
    assert gc.isenabled()


def test_blocks_keep_bursts_together():
    # 20 bursts of 50 slow rounds: as noisy as 20 coin tosses, not 1000.
    bursts = np.repeat(np.random.default_rng(0).permutation([1.0, 2.0] * 10), 50)
    values = bursts + np.random.default_rng(1).normal(0, 0.3, size=1000)
    low, high = latency._interval(values, np.median, seed=0)
    alone = np.random.default_rng(0).permutation(values)
    low_alone, high_alone = latency._interval(alone, np.median, seed=0)
    assert high - low > 2 * (high_alone - low_alone)


def test_bursts_do_not_move_the_speedup(clock):
    def bursts(call):
        return 10 if call % 100 < 80 else 1000

    predictors = {"base": Scripted(clock, lambda _: 10), "bursts": Scripted(clock, bursts)}
    assert measure_latency(predictors, X).summary.speedup["bursts"] == pytest.approx(1)


def test_a_model_does_not_differ_from_itself():
    model = models.build("lenet-5")
    said = []
    for seed in range(4):
        pair = {name: prepare(model, example_input=(X,)) for name in ("model", "itself")}
        said.append(measure_latency(pair, X, repeats=40, seed=seed).summary.verdict["itself"])
    assert said.count("no measurable difference") >= 3


@given(st.floats(0.01, 100), st.floats(1, 3), st.floats(1, 3), st.booleans())
def test_verdict_says_what_the_interval_says(speedup, below, above, simulated):
    words = verdict(speedup, speedup / below, speedup * above, simulated=simulated)
    differs = speedup / below > 1 or speedup * above < 1
    assert ("no measurable difference" in words) != differs
    assert ("slower" in words) == (differs and speedup < 1)
    assert ("faster" in words) == (differs and speedup > 1 and not simulated)
    assert words.startswith("simulated") == simulated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictors": {}}, "nothing to measure"),
        ({"baseline": "z"}, r"baseline is 'z'; choose from \['a'\]"),
        ({"repeats": 3}, "repeats is 3; give 10 or more"),
        ({"warmup": 0}, "warmup is 0"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_bad_arguments_are_refused(clock, arguments, message):
    arguments = {"predictors": {"a": Scripted(clock, lambda _: 5)}, "inputs": X} | arguments
    with pytest.raises(ValueError, match=message):
        measure_latency(**arguments)


def test_doctests():
    assert doctest.testmod(latency).failed == 0
