"""Values and advantages: Best-of-K provers in closed form and the score that search ranks by.

Numbering follows the PAV paper (arXiv 2410.08146, ICLR version).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pav.core.errors import UserError

Real = TypeVar("Real", float, NDArray[np.float64])


def best_of_k(q: Real, k: int) -> Real:
    """Chance that at least one of ``k`` independent rollouts is right (Eq. 30), elementwise."""
    if k < 1:
        raise UserError(f"best-of-K needs K of at least 1, got {k}")
    return 1.0 - (1.0 - q) ** k


def best_of_k_from_counts(k_right: ArrayLike, n: ArrayLike, k: int) -> NDArray[np.float64]:
    """Unbiased Best-of-K value from ``k_right`` of ``n`` rollouts: 1 - C(n-k_right, K) / C(n, K).

    The plug-in ``best_of_k(k_right / n, k)`` is biased low. Shapes broadcast.

    Raises:
        UserError: if K exceeds a number of rollouts (no unbiased estimate exists).
    """
    right = np.asarray(k_right, dtype=np.float64)
    total = np.asarray(n, dtype=np.float64)
    if k < 1 or np.any(total < k):
        raise UserError(
            f"best-of-{k} needs at least {k} rollouts per prefix, the labels have "
            f"{int(np.min(total))}; raise n_mc or lower K"
        )
    from scipy.special import gammaln

    wrong = total - right
    with np.errstate(invalid="ignore"):
        ratio = gammaln(wrong + 1) - gammaln(wrong - k + 1) - gammaln(total + 1)
        none_right = np.exp(ratio + gammaln(total - k + 1))
    return 1.0 - np.where(wrong >= k, none_right, 0.0)


def effective_score(
    q_base: Real, q_prover_before: Real, q_prover_after: Real, alpha: float
) -> Real:
    """Score of a step: Q_base + alpha * A_prover (Section 4; A by Eq. 2)."""
    return q_base + alpha * (q_prover_after - q_prover_before)


def distinguishability(
    a_prover_SA: NDArray[np.float64], policy_SA: NDArray[np.float64], weight_S: NDArray[np.float64]
) -> float:
    """E_s V_{a~pi}[A^mu]: how far the prover tells the policy's steps apart (Theorem 3.1).

    Args:
        a_prover_SA: the prover's advantages (or Q: a constant per state changes nothing).
        policy_SA: the policy's step probabilities; rows add up to 1.
        weight_S: how often the policy visits a state. Visits summed over positions give the sum
            over a response, shares give the mean over states.
    """
    mean_S = (policy_SA * a_prover_SA).sum(axis=1)
    return float(weight_S @ (policy_SA * (a_prover_SA - mean_S[:, None]) ** 2).sum(axis=1))


def alignment(
    a_prover_SA: NDArray[np.float64],
    a_policy_SA: NDArray[np.float64],
    policy_SA: NDArray[np.float64],
    weight_S: NDArray[np.float64],
) -> float:
    """E_s E_{a~pi}[A^mu A^pi]: whether prover and policy prefer the same steps (Theorem 3.1).

    Arguments as in :func:`distinguishability`; ``a_policy_SA`` are the policy's own advantages.
    """
    return float(weight_S @ (policy_SA * a_prover_SA * a_policy_SA).sum(axis=1))
