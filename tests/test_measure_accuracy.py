"""Intervals and tests against scipy, closed forms and simulation."""

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from workbench.measure import accuracy

answers = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=200)


@given(answers)
def test_wilson_against_its_formula(scores):
    n, p, z = len(scores), np.mean(scores), stats.norm.ppf(0.975)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = accuracy.interval(scores, proportion=True)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert -1e-12 <= low <= p + 1e-12
    assert p - 1e-12 <= high <= 1 + 1e-12


def test_wilson_does_not_collapse_when_all_are_right():
    low, high = accuracy.interval(torch.ones(20), proportion=True)
    assert low < 0.85
    assert high == pytest.approx(1)


def test_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 8))
    intervals = [accuracy.interval(row, proportion=False) for row in draws]
    covered = np.mean([low <= 3.0 <= high for low, high in intervals])
    assert 0.935 < covered < 0.965  # a normal interval would cover 0.91


def test_interval_of_one_example_is_unknown():
    assert all(math.isnan(end) for end in accuracy.interval([2.0], proportion=False))


@given(answers, st.randoms())
def test_mcnemar_is_the_sign_test_of_the_changed_answers(before, random):
    after = [random.choice((0.0, 1.0)) for _ in before]
    gained = sum(a > b for b, a in zip(before, after, strict=True))
    lost = sum(a < b for b, a in zip(before, after, strict=True))
    # Two-sided exact test, written out: every split at most as likely as the one seen.
    n = gained + lost
    ways = [math.comb(n, k) for k in range(n + 1)]
    expected = sum(way for way in ways if way <= ways[gained]) / 2**n
    p_value = accuracy.paired_p_value(before, after, proportion=True)
    assert p_value == pytest.approx(expected)
    assert p_value == pytest.approx(accuracy.paired_p_value(after, before, proportion=True))


def test_other_scores_take_the_paired_test():
    generator = np.random.default_rng(1)
    before = generator.normal(size=50)
    after = before + generator.normal(0.1, 0.2, size=50)
    p_value = accuracy.paired_p_value(before, after, proportion=False)
    assert p_value == pytest.approx(stats.ttest_rel(before, after).pvalue)
    assert p_value < 0.01 < stats.ttest_ind(before, after).pvalue  # pairing is what finds it


@pytest.mark.parametrize("proportion", [True, False])
def test_no_change_is_no_evidence(proportion):
    scores = [1.0, 0.0, 1.0]
    assert accuracy.paired_p_value(scores, scores, proportion) == 1.0


def test_the_same_change_everywhere_is_certain():
    assert accuracy.paired_p_value([1.0, 2.0], [1.5, 2.5], proportion=False) == 0.0


def test_mean_and_standard_deviation_of_seeds():
    values = [0.9, 0.92, 0.97]
    assert accuracy.several_seeds(values) == pytest.approx(
        (np.mean(values), np.std(values, ddof=1))
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy.interval([], True), "no scores"),
        (lambda: accuracy.interval([1.0, math.nan], True), "1 of 2 scores are NaN"),
        (lambda: accuracy.interval([0.5, 1.0], True), "a score is 0.5"),
        (lambda: accuracy.paired_p_value([1.0], [1.0, 0.0], True), "of 1 and 2 examples"),
        (lambda: accuracy.several_seeds([0.9]), "1 value; give 2 or more"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_doctests():
    assert doctest.testmod(accuracy, optionflags=doctest.ELLIPSIS).failed == 0
