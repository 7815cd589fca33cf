"""Likelihood rewards: how probable the policy finds the reference answer after its own chain.

With z a chain and a* the reference of |a*| tokens (arXiv 2602.03979, Eqs. 7 to 11), the gradient
of ``E[R(z)]`` is ``E[(R - b) grad log pi(z) + grad R]`` (Eq. 4), b the mean of the group's others.
R is a function of the log-probabilities of a*'s tokens, so ``grad R`` weighs each of them with R's
derivative: one forward pass over prompt, chain and reference gives reward and gradient, and no
answer is sampled.

Axes: G chains of one problem, A tokens of the reference after one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

from pav.rl.config import RewardKind

Array = NDArray[np.float64]
Baseline = Callable[[Array], Array]


def reward(kind: RewardKind, logprob_A: Array) -> float:
    """R of one chain.

    ``probability`` (VeriFree): pi(a*). ``avg_probability`` (RLPR): the mean over its tokens.
    ``logprob``: log pi(a*). ``avg_logprob``: the same per token. ``jepo`` and ``sft``: log pi(a*),
    of which :func:`weights` makes a group's.

    Args:
        kind: which.
        logprob_A: log-probability of every token of the reference.
    """
    if kind == "probability":
        return float(np.exp(logprob_A.sum()))
    if kind == "avg_probability":
        return float(np.exp(logprob_A).mean())
    if kind == "avg_logprob":
        return float(logprob_A.mean())
    return float(logprob_A.sum())


def derivative(kind: RewardKind, logprob_A: Array) -> Array:
    """DR / d logprob (A,) of every token of the reference."""
    if kind == "probability":
        return np.full(len(logprob_A), np.exp(logprob_A.sum()))
    if kind == "avg_probability":
        return np.asarray(np.exp(logprob_A) / len(logprob_A))
    if kind == "avg_logprob":
        return np.full(len(logprob_A), 1 / len(logprob_A))
    return np.ones(len(logprob_A))


def weights(
    kind: RewardKind, logprobs: Sequence[Array], baseline: Baseline
) -> tuple[Array, list[Array]]:
    """What log-probabilities of a group are multiplied with: every token of its chains, and every
    token of the reference after each.

    ``jepo``: the reward of the group is ``log mean pi(a*)`` over its chains (Eq. 11). A chain is
    weighed with what the reward would lose without it, and its reference with its share of the sum.
    Both are times G, since the loss is a mean over chains and this is a reward of the group.

    Args:
        kind: which reward.
        logprobs: of the reference's tokens after each chain of the group (A,).
        baseline: takes rewards (P, G) to rewards less their baseline: ``rloo`` or ``group_mean``.

    Returns:
        (G,) weight of a chain's tokens, and (A,) of the reference's after each.
    """
    group = len(logprobs)
    if kind == "sft":
        return np.zeros(group), [np.ones(len(row)) for row in logprobs]
    if kind == "jepo":
        log_G = np.array([row.sum() for row in logprobs])
        share_G = group * softmax(log_G)
        return group * contributions(log_G), [
            np.full(len(row), share) for row, share in zip(logprobs, share_G, strict=True)
        ]
    reward_G = np.array([reward(kind, row) for row in logprobs])
    return baseline(reward_G[None])[0], [derivative(kind, row) for row in logprobs]


def contributions(log_G: Array) -> Array:
    """``log mean over all`` minus ``log mean over the others`` (G,), of ``exp(log_G)``."""
    group = len(log_G)
    others_GG = np.where(np.eye(group, dtype=bool), -np.inf, log_G)
    everyone = logsumexp(log_G) - np.log(group)
    return np.asarray(everyone - (logsumexp(others_GG, axis=1) - np.log(group - 1)))


def log_mean(log_G: Array) -> float:
    """``log mean exp``: log-probability of the reference over G chains (MC-G), a lower bound."""
    return float(logsumexp(log_G) - np.log(len(log_G)))
