"""The paper's worked beam example, Best-of-K values and prover statistics."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from pav.core.advantage import (
    alignment,
    best_of_k,
    best_of_k_from_counts,
    distinguishability,
    effective_score,
)
from pav.core.errors import UserError

# PAV paper, Figure 2a: two states and the Q of three steps from each.
V = {"s1": 0.60, "s2": 0.30}
Q = {
    "a11": ("s1", 0.55), "a12": ("s1", 0.50), "a13": ("s1", 0.70),
    "a21": ("s2", 0.50), "a22": ("s2", 0.35), "a23": ("s2", 0.25),
}  # fmt: skip


def kept(alpha: float, q_weight: float = 1.0) -> set[str]:
    """The two steps that a beam of two keeps."""
    scores = {
        step: effective_score(q_weight * q, V[state], q, alpha) for step, (state, q) in Q.items()
    }
    return set(sorted(scores, key=lambda step: -scores[step])[:2])


def test_figure_2a_beam_of_two_keeps_other_steps_by_advantage_than_by_q() -> None:
    assert kept(alpha=0.0) == {"a13", "a11"}
    assert kept(alpha=1.0, q_weight=0.0) == {"a13", "a21"}


@given(st.floats(0, 10))
def test_figure_2a_advantage_saves_the_progress_of_the_worse_state_iff_alpha_exceeds_a_fifth(
    alpha: float,
) -> None:
    if abs(alpha - 0.2) < 1e-9:
        return
    assert kept(alpha) == ({"a13", "a21"} if alpha > 0.2 else {"a13", "a11"})


def test_scores_of_arrays_are_those_of_their_elements() -> None:
    q = np.array([q for _, q in Q.values()])
    before = np.array([V[state] for state, _ in Q.values()])
    together = effective_score(q, before, q, 0.5)
    apart = [
        effective_score(float(a), float(b), float(a), 0.5) for a, b in zip(q, before, strict=True)
    ]
    np.testing.assert_allclose(together, apart)
    np.testing.assert_allclose(together[[0, 3]], [0.525, 0.6])


def test_best_of_k_is_the_chance_of_one_right_rollout_in_k() -> None:
    assert best_of_k(0.1, 4) == pytest.approx(0.3439)
    assert best_of_k(0.3, 1) == pytest.approx(0.3)
    np.testing.assert_array_equal(best_of_k(np.array([0.0, 1.0]), 7), [0, 1])
    with pytest.raises(UserError, match="best-of-K needs K of at least 1, got 0"):
        best_of_k(0.5, 0)


# scipy's pmf overflows at subnormal p.
@given(st.floats(1e-9, 1), st.integers(1, 14), st.data())
def test_best_of_k_from_counts_is_unbiased(p: float, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    right = np.arange(n + 1)
    expected = binom.pmf(right, n, p) @ best_of_k_from_counts(right, n, k)
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-9)


@given(st.integers(1, 60), st.data())
def test_best_of_k_from_counts_is_the_share_of_draws_that_hold_a_right_one(
    n: int, data: st.DataObject
) -> None:
    k, right = data.draw(st.integers(1, n)), data.draw(st.integers(0, n))
    exact = 1 - comb(n - right, k) / comb(n, k)
    assert best_of_k_from_counts(right, n, k) == pytest.approx(exact, abs=1e-9)


def test_plug_in_reads_29_percent_for_a_true_34() -> None:
    right, p, n, k = np.arange(9), 0.1, 8, 4
    chance = binom.pmf(right, n, p)
    assert chance @ best_of_k(right / n, k) == pytest.approx(0.29, abs=0.005)
    assert chance @ best_of_k_from_counts(right, n, k) == pytest.approx(0.3439)


def test_more_rollouts_wanted_than_made_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"best-of-4 needs at least 4 .* have 2; raise n_mc or lower"
    ):
        best_of_k_from_counts([1, 1, 0], [8, 2, 8], 4)
    with pytest.raises(UserError, match="best-of-0"):
        best_of_k_from_counts(1, 8, 0)


def test_counts_broadcast_over_prefixes() -> None:
    values = best_of_k_from_counts(np.array([[0], [8]]), np.array([8, 16]), 2)
    np.testing.assert_allclose(values, [[0, 0], [1, 1 - comb(8, 2) / comb(16, 2)]], atol=1e-12)


# Two states of three steps: Q of the prover and of the policy, the policy, its visits.
Q_PROVER_SA = np.array([[0.1, 0.5, 0.9], [0.3, 0.3, 0.6]])
Q_POLICY_SA = np.array([[0.2, 0.1, 0.3], [0.0, 0.8, 0.4]])
POLICY_SA = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
VISITS_S = np.array([1.0, 0.7])


def test_prover_statistics_are_variance_and_covariance_over_the_policys_steps() -> None:
    variance = [np.cov(q, aweights=p, ddof=0) for q, p in zip(Q_PROVER_SA, POLICY_SA, strict=True)]
    assert distinguishability(Q_PROVER_SA, POLICY_SA, VISITS_S) == pytest.approx(
        VISITS_S @ variance
    )
    a_policy_SA = Q_POLICY_SA - (POLICY_SA * Q_POLICY_SA).sum(axis=1, keepdims=True)
    covariance = [
        np.cov(mu, pi, aweights=p, ddof=0)[0, 1]
        for mu, pi, p in zip(Q_PROVER_SA, Q_POLICY_SA, POLICY_SA, strict=True)
    ]
    assert alignment(Q_PROVER_SA, a_policy_SA, POLICY_SA, VISITS_S) == pytest.approx(
        VISITS_S @ covariance
    )
