"""Exact values and visits of a small deterministic decision process, by dynamic programming.

Axes: H position, S state, A action. A policy is (S, A), or (H, S, A) where it varies with position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Values:
    """Exact values of one policy.

    Attributes:
        v: (H + 1, S); the last row is the reward.
        q: (H, S, A).
    """

    v: Array
    q: Array

    @property
    def success(self) -> float:
        """Expected reward from state 0."""
        return float(self.v[0, 0])

    @property
    def a(self) -> Array:
        """Advantages (H, S, A), Eq. 2."""
        return self.q - self.v[:-1, :, None]


@dataclass(frozen=True)
class Mdp:
    """A process that starts in state 0 and ends after ``horizon`` actions.

    Attributes:
        next_SA: state after an action.
        reward_S: expected reward of the state in which it ends.
        horizon: actions.
    """

    next_SA: NDArray[np.int64]
    reward_S: Array
    horizon: int

    def spread(self, policy: Array) -> Array:
        """The policy as (H, S, A)."""
        return np.broadcast_to(policy, (self.horizon, *self.next_SA.shape))

    def values(self, policy: Array) -> Values:
        """Q and V of a policy."""
        pi_HSA = self.spread(policy)
        v = np.empty((self.horizon + 1, len(self.reward_S)))
        q = np.empty(pi_HSA.shape)
        v[-1] = self.reward_S
        for h in reversed(range(self.horizon)):
            q[h] = v[h + 1][self.next_SA]
            v[h] = (pi_HSA[h] * q[h]).sum(axis=1)
        return Values(v, q)

    def visits(self, policy: Array) -> Array:
        """Chance (H, S) of being in a state at a position."""
        pi_HSA = self.spread(policy)
        d = np.zeros(pi_HSA.shape[:2])
        d[0, 0] = 1.0
        for h in range(self.horizon - 1):
            np.add.at(d[h + 1], self.next_SA, d[h][:, None] * pi_HSA[h])
        return d
