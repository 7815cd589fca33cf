"""Theorem 3.1, Remark 3.1 and Proposition F.1 against exact improvements (PAV paper, App. F).

The setting is the proof's: a tabular softmax policy, exact advantages, one natural policy gradient
step ``pi * exp(rate * (A^pi + alpha A^mu))``. Sums over a response stand where the paper has
expectations over states. To first order in the rate the improvement is

    rate * (E V[A^pi] + alpha E[A^mu A^pi]),

*own* variance plus alignment; the theorem has the prover's variance in its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.planted.mdp import Array, Mdp
from pav.core.advantage import alignment, best_of_k, distinguishability


@dataclass(frozen=True)
class Step:
    """One natural policy gradient step and what the paper bounds it by.

    Attributes:
        improvement: V after minus V before, from state 0, divided by the rate.
        distinguishability: sum over positions of E_s V_a[A^mu].
        alignment: sum over positions of E_s E_a[A^mu A^pi].
        own: sum over positions of E_s V_a[A^pi].
        eta: mean over visits of |V^mu - V^pi| (Proposition F.1).
    """

    improvement: float
    distinguishability: float
    alignment: float
    own: float
    eta: float

    @property
    def bound(self) -> float:
        """Right side of Theorem 3.1 without its constant, divided by the rate."""
        return self.distinguishability + self.alignment

    @property
    def first_order(self) -> float:
        """What the improvement tends to as the rate goes to 0."""
        return self.own + self.alignment


def natural_step(policy: Array, advantage: Array, rate: float) -> Array:
    """``pi * exp(rate * advantage)``, normalised (Lemma F.2); shapes (..., A)."""
    weight = policy * np.exp(rate * advantage)
    return np.asarray(weight / weight.sum(axis=-1, keepdims=True))


def check(mdp: Mdp, policy: Array, v_prover: Array, rate: float, alpha: float = 1.0) -> Step:
    """One step from ``policy`` with the advantages of a prover whose values are ``v_prover``.

    ``v_prover`` is (H + 1, S), so that Best-of-K provers fit too: their Q is a function of the
    policy's (Eq. 30).
    """
    own = mdp.values(policy)
    pi_HSA = mdp.spread(policy)
    a_prover = v_prover[1:][:, mdp.next_SA] - v_prover[:-1, :, None]
    after = mdp.values(natural_step(pi_HSA, own.a + alpha * a_prover, rate))
    visits_HS = mdp.visits(policy)
    weight = visits_HS.ravel()
    pi, mu, a = (x.reshape(len(weight), -1) for x in (pi_HSA, a_prover, own.a))
    return Step(
        improvement=(after.success - own.success) / rate,
        distinguishability=distinguishability(mu, pi, weight),
        alignment=alignment(mu, a, pi, weight),
        own=distinguishability(a, pi, weight),
        eta=float((visits_HS * np.abs(v_prover - own.v)[:-1]).sum() / mdp.horizon),
    )


def best_of(mdp: Mdp, policy: Array, k: int) -> Array:
    """Values (H + 1, S) of Best-of-K of a policy."""
    return best_of_k(mdp.values(policy).v, k)


def natural_run(
    mdp: Mdp, policy: Array, v_prover: Array, rate: float, updates: int, alpha: float = 1.0
) -> NDArray[np.float64]:
    """Success (updates + 1,) along a run of steps with a fixed prover: no noise, no network."""
    a_prover = v_prover[1:][:, mdp.next_SA] - v_prover[:-1, :, None]
    pi_HSA = mdp.spread(policy)
    success = []
    for _ in range(updates + 1):
        own = mdp.values(pi_HSA)
        success.append(own.success)
        pi_HSA = natural_step(pi_HSA, own.a + alpha * a_prover, rate)
    return np.array(success)


def random_case(rng: np.random.Generator) -> tuple[Mdp, Array, Array]:
    """A random process of 6 states, 3 actions, 4 positions, with two random policies."""
    states, actions = 6, 3
    mdp = Mdp(rng.integers(0, states, (states, actions)), rng.random(states), 4)
    peak = rng.exponential(2.0, size=2)
    policies = [np.exp(p * rng.normal(size=(states, actions))) for p in peak]
    base, prover = (p / p.sum(axis=1, keepdims=True) for p in policies)
    return mdp, base, prover


def counterexample() -> tuple[Mdp, Array, Array]:
    """A process where the bound of Theorem 3.1 is positive and the step makes the policy worse.

    The policy all but always takes the first action after the first position, where the first
    branch is worth .55 and the second .45. The prover takes the second action there, which is worth
    0 and 1: it prefers the wrong branch, ten times as strongly as the policy prefers the right one.
    """
    next_SA = np.array([[1, 2], [3, 4], [5, 6], [3, 3], [4, 4], [5, 5], [6, 6]])
    reward_S = np.array([0, 0, 0, 0.55, 0, 0.45, 1])
    base, prover = np.full((7, 2), 0.5), np.full((7, 2), 0.5)
    base[1:3], prover[1:3] = [1 - 1e-6, 1e-6], [1e-6, 1 - 1e-6]
    return Mdp(next_SA, reward_S, 2), base, prover
