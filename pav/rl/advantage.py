"""From rewards to the weight of every token: the bracket of Eq. 5, Q^pi + alpha * A^mu.

The outcome is return-to-go: it weighs every token of its trace, less a baseline over the group. A
step's credit weighs that step's own tokens. Credits of a trace are never added up into one number:
advantages telescope, and what tells its steps apart would be gone.

Axes: P problems, G traces of one problem (a group), S steps of a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pav.core.errors import UserError

Array = NDArray[np.float64]
# What is taken off the credits before they weigh tokens.
Center = Literal["none", "step", "batch"]


def rloo(reward_PG: Array) -> Array:
    """Reward minus the mean of the group's other G - 1 (P, G): REINFORCE leave-one-out.

    The baseline does not depend on the trace that it is taken from, so the gradient is unbiased.
    It is not divided by a standard deviation, which would weigh problems by how sure they are.

    Raises:
        UserError: for groups of one.
    """
    group = _group(reward_PG)
    return (reward_PG - reward_PG.mean(axis=1, keepdims=True)) * (group / (group - 1))


def group_mean(reward_PG: Array) -> Array:
    """Reward minus the mean of the whole group (P, G), as in GRPO without its standard deviation.

    A trace is part of its own baseline, so the expected gradient is (G - 1) / G of the true one.

    Raises:
        UserError: for groups of one.
    """
    _group(reward_PG)
    return reward_PG - reward_PG.mean(axis=1, keepdims=True)


def _group(reward_PG: Array) -> int:
    group = reward_PG.shape[1]
    if group < 2:
        raise UserError(
            f"group is {group}, and a baseline over the group needs others to compare with; give "
            "group 2 or more, or a learned value as baseline"
        )
    return group


BASELINES = {"rloo": rloo, "group_mean": group_mean}


def dead(reward_PG: Array) -> NDArray[np.bool_]:
    """Groups (P,) whose outcomes are all alike: their outcomes teach nothing."""
    return np.asarray((reward_PG == reward_PG[:, :1]).all(axis=1))


def step_credit(gain_S: Array, credit_lambda: float) -> Array:
    """Credit of every step (S,): ``sum over j >= h of lambda^(j - h) * gain_j``.

    Args:
        gain_S: what each step gained, e.g. A^mu = Q^mu after it minus Q^mu before it (Eq. 2). Axes
            before the last are of traces of equal length.
        credit_lambda: 0 credits a step with its own gain alone (Eq. 5); 1 with all later ones,
            too: advantages telescope to the last Q minus the Q before the step.
    """
    credit_S = np.array(gain_S, dtype=np.float64)
    for h in range(credit_S.shape[-1] - 2, -1, -1):
        credit_S[..., h] += credit_lambda * credit_S[..., h + 1]
    return credit_S


def center(credits: Sequence[Array], how: Center) -> list[Array]:
    """Credits of all traces less their mean.

    Args:
        credits: one array (S,) per trace of the batch; their lengths may differ.
        how: ``none`` leaves them; ``step`` takes off the mean over the batch at the same step
            index, ``batch`` the mean over all steps. Either mean holds the step itself, so of n
            steps that share it a share of 1 / n of the gradient is lost. Traces that reach a late
            step are few: its mean says more of those traces than of the step.
    """
    if how == "none" or not credits:
        return list(credits)
    all_N = np.concatenate(credits)
    lengths = np.array([len(credit_S) for credit_S in credits])
    ends = lengths.cumsum()
    step_N = np.arange(len(all_N)) - np.repeat(ends - lengths, lengths)
    all_N = minus_mean(all_N, step_N if how == "step" else np.zeros_like(step_N))
    return [all_N[end - len(c) : end] for c, end in zip(credits, ends.tolist(), strict=True)]


def minus_mean(credit_N: Array, group_N: NDArray[np.int64]) -> Array:
    """Credits (N,) less the mean of those of the same group, a number from 0."""
    mean_G = np.bincount(group_N, credit_N) / np.maximum(np.bincount(group_N), 1)
    return credit_N - mean_G[group_N]


def token_weights(length: int, ends: Sequence[int], outcome: float, credit_S: Array) -> Array:
    """What the log-probability of every solution token is weighted with (length,): Eq. 5.

    Args:
        length: tokens of the solution; the prompt has none.
        ends: exclusive ends of the complete steps (``Stepper.step_ends``): step h holds the tokens
            from ``ends[h - 1]``, or 0, up to but not including ``ends[h]``, its delimiter or EOS
            among them.
        outcome: reward of the whole trace less its baseline. It is return-to-go, the same at every
            token.
        credit_S: credit of each complete step, e.g. ``alpha * step_credit(A)``.

    Returns:
        outcome + credit of the step that holds the token; after the last complete step, in the
        tail of a truncated solution, the outcome alone.
    """
    sizes = np.diff([0, *ends])
    if len(sizes) != len(credit_S) or (sizes <= 0).any() or sizes.sum() > length:
        raise ValueError(f"{len(credit_S)} credits, steps that end at {list(ends)} of {length}")
    weight = np.full(length, float(outcome))
    weight[: sizes.sum()] += np.repeat(credit_S, sizes)
    return weight
