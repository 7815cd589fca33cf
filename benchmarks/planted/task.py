"""The planted sub-sequence task and its procedural provers, with exact values (PAV paper, App. B).

A response is 10 tokens of a vocabulary of 15; it is right if the planted sequence occurs in it,
contiguous, before the end-of-sequence token. Whether it can still become right depends on the
position and on the *matched prefix* only (how many of the latest tokens begin the planted sequence,
overlaps included), so values under a prover follow exactly by dynamic programming.

Axes: H position (tokens emitted so far), S state, A token. State k < 5 is a matched prefix of k;
then ``RIGHT`` and ``ENDED``, which nothing leaves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.planted.mdp import Array, Mdp, Values
from pav.core.errors import UserError

LENGTH = 10
VOCABULARY = 15
EOS = 14
PLANTED = (3, 6, 0, 3, 5)
RIGHT, ENDED = len(PLANTED), len(PLANTED) + 1
STATES = ENDED + 1


def _transitions() -> NDArray[np.int64]:
    next_SA = np.empty((STATES, VOCABULARY), dtype=np.int64)
    next_SA[RIGHT], next_SA[ENDED] = RIGHT, ENDED
    for k in range(len(PLANTED)):
        for token in range(VOCABULARY):
            seen = (*PLANTED[:k], token)
            next_SA[k, token] = max(
                j for j in range(len(seen) + 1) if PLANTED[:j] == seen[len(seen) - j :]
            )
        next_SA[k, EOS] = ENDED
    return next_SA


NEXT_SA = _transitions()
MDP = Mdp(NEXT_SA, np.eye(STATES)[RIGHT], LENGTH)


def prover(gamma: float) -> Array:
    """Token probabilities (S, A) of mu_gamma: weight ``gamma`` on the next planted token, 1 else.

    In states that nothing leaves it is uniform; the paper does not say and no value depends on it.
    """
    if not gamma > 0:
        raise UserError(f"gamma is {gamma}; give a positive weight")
    weight_SA = np.ones((STATES, VOCABULARY))
    weight_SA[np.arange(len(PLANTED)), PLANTED] = gamma
    return weight_SA / weight_SA.sum(axis=1, keepdims=True)


def values(policy: Array) -> Values:
    """Exact values of a policy (S, A), or (H, S, A) where it varies with the position."""
    return MDP.values(policy)


def sample(policy: Array, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Responses (count, H) of a policy (S, A). Tokens after the end of sequence mean nothing."""
    tokens = np.empty((count, LENGTH), dtype=np.int64)
    state = np.zeros(count, dtype=np.int64)
    cumulative_SA = policy.cumsum(axis=1)
    for h in range(LENGTH):
        above = rng.random(count)[:, None] > cumulative_SA[state]
        tokens[:, h] = np.minimum(above.sum(axis=1), VOCABULARY - 1)
        state = NEXT_SA[state, tokens[:, h]]
    return tokens


def states_of(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """States (..., H + 1) before the first and after every token of responses (..., H)."""
    states = np.zeros((*tokens.shape[:-1], LENGTH + 1), dtype=np.int64)
    for h in range(LENGTH):
        states[..., h + 1] = NEXT_SA[states[..., h], tokens[..., h]]
    return states


def is_live(tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tokens (..., H) count: those up to and including the first end of sequence."""
    is_eos = tokens == EOS
    return np.asarray(np.cumsum(is_eos, axis=-1) - is_eos == 0)
