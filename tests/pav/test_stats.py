"""Intervals over problems: exact means, honest coverage, pairing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pav.core.statistics import bootstrap, mcnemar

outcomes = arrays(
    np.float64,
    st.tuples(st.integers(1, 30), st.integers(1, 4)),
    elements=st.sampled_from([0.0, 1.0]),
)


@given(outcomes)
@settings(max_examples=40, deadline=None)
def test_mean_is_exact_and_inside_its_interval(values_PS: np.ndarray) -> None:
    interval = bootstrap(values_PS)
    assert interval.mean == pytest.approx(values_PS.sum() / values_PS.size, abs=1e-12)
    assert 0.0 <= interval.low <= interval.high <= 1.0
    # A problem's seeds stay together, so their order does not matter.
    assert bootstrap(values_PS[:, ::-1]) == interval


@given(outcomes)
@settings(max_examples=20, deadline=None)
def test_paired_difference_of_a_method_to_itself_is_exactly_zero(values_PS: np.ndarray) -> None:
    difference = bootstrap(values_PS - values_PS)
    assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)


def coverage(seeds: int, spread: float) -> float:
    """Share of simulated comparisons whose interval holds the truth.

    Problems differ in difficulty by ``spread``; their seeds are independent given the problem.
    """
    rng = np.random.default_rng(0)
    truth, hits, trials = 0.4, 0, 250
    for trial in range(trials):
        chance_P1 = truth + spread * rng.choice([-1.0, 1.0], size=(80, 1))
        correct_PS = (rng.random((80, seeds)) < chance_P1).astype(np.float64)
        interval = bootstrap(correct_PS, seed=trial)
        hits += interval.low <= truth <= interval.high
    return hits / trials


def test_interval_holds_the_truth_about_nineteen_times_in_twenty() -> None:
    assert 0.91 <= coverage(seeds=1, spread=0.0) <= 0.98
    # Seeds of one problem are no independent evidence: an interval over (problem, seed) pairs
    # would hold the truth only two times in three here.
    assert 0.91 <= coverage(seeds=8, spread=0.35) <= 0.98


def test_paired_interval_is_narrower_than_the_difference_of_two() -> None:
    rng = np.random.default_rng(1)
    a_PS = (rng.random((200, 1)) < 0.5).astype(np.float64)
    b_PS = a_PS.copy()
    b_PS[:10] = 1.0 - b_PS[:10]
    paired, a = bootstrap(a_PS - b_PS), bootstrap(a_PS)
    assert paired.high - paired.low < 0.5 * (a.high - a.low)
    assert paired.mean == pytest.approx(a_PS.mean() - b_PS.mean())


def test_repeat_is_identical() -> None:
    values = np.random.default_rng(2).random((50, 3))
    assert bootstrap(values) == bootstrap(values)
    assert str(bootstrap(np.ones((4, 1)))) == "1.000 [1.000, 1.000]"


def test_mcnemar_counts_only_problems_on_which_two_methods_differ() -> None:
    a_PS = np.zeros((40, 1))
    b_PS = np.zeros((40, 1))
    a_PS[:9] = 1.0
    b_PS[9:10] = 1.0
    # Nine to one under a fair coin: (1 + 10) * 2 of 2^10 outcomes are as uneven.
    assert mcnemar(a_PS, b_PS) == pytest.approx(22 / 1024)
    assert mcnemar(b_PS, a_PS) == mcnemar(a_PS, b_PS)
    assert mcnemar(a_PS, a_PS) == 1.0
    both = np.ones((1000, 1))
    assert mcnemar(np.vstack([a_PS, both]), np.vstack([b_PS, both])) == mcnemar(a_PS, b_PS)


def test_mcnemar_does_not_take_the_seeds_of_a_problem_for_evidence() -> None:
    """With no true difference p is small no more often than it says, however many the seeds."""
    rng = np.random.default_rng(0)
    small = 0
    for _ in range(300):
        chance_P1 = rng.choice([0.05, 0.95], size=(60, 1))
        other_P1 = rng.permutation(chance_P1)
        a_PS, b_PS = (
            (rng.random((60, 8)) < chance).astype(np.float64) for chance in (chance_P1, other_P1)
        )
        small += mcnemar(a_PS, b_PS) < 0.05
    assert small / 300 <= 0.07
