"""Tokens at equal quality, with intervals.

Axes: R replicates, S shares of the budget in rising order, P held-out problems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 2000


@dataclass(frozen=True)
class Curve:
    """What an arm spent and how good the verifiers became.

    Attributes:
        tokens_RS: tokens spent.
        brier_RSP: Brier score summed over the prefixes of a problem.
        prefixes_P: prefixes of a problem.
    """

    tokens_RS: Array
    brier_RSP: Array
    prefixes_P: Array

    def mean(self, replicates: NDArray[np.intp], problems: NDArray[np.intp]) -> tuple[Array, Array]:
        """(tokens, Brier score) by share, over chosen replicates and problems."""
        prefixes = self.prefixes_P[problems].sum()
        brier_S = self.brier_RSP[replicates][:, :, problems].sum(-1).mean(0) / prefixes
        return self.tokens_RS[replicates].mean(0), brier_S

    @property
    def whole(self) -> tuple[Array, Array]:
        """The same over all of them."""
        return self.mean(np.arange(len(self.tokens_RS)), np.arange(len(self.prefixes_P)))


def tokens_for(brier: float, tokens_S: Array, brier_S: Array) -> float:
    """Tokens at which a curve first reaches a Brier score, by interpolation over log tokens.

    Its first tokens if it starts as good as that, its last ones if it never becomes so: then the
    true number lies below, or above.
    """
    if brier_S[0] <= brier:
        return float(tokens_S[0])
    for i in range(1, len(brier_S)):
        if brier_S[i] <= brier:
            part = (brier_S[i - 1] - brier) / (brier_S[i - 1] - brier_S[i])
            low, high = log(tokens_S[i - 1]), log(tokens_S[i])
            return float(np.exp(low + part * (high - low)))
    return float(tokens_S[-1])


def token_ratio(arm: Curve, reference: Curve, seed: int = 0) -> tuple[float, list[float]]:
    """Tokens at which ``arm`` is as good as the whole ``reference``, over the latter's.

    Returns:
        The ratio (a bound where :func:`tokens_for` gives one) and its 95% interval, by a bootstrap
        over replicates and held-out problems.
    """

    def ratio(rows: NDArray[np.intp], problems: NDArray[np.intp]) -> float:
        tokens_S, brier_S = reference.mean(rows, problems)
        return tokens_for(float(brier_S[-1]), *arm.mean(rows, problems)) / float(tokens_S[-1])

    return _with_interval(ratio, arm, seed)


def bound(arm: Curve, reference: Curve) -> str:
    """Whether the ratio is only a bound: ``at most``, ``at least`` or nothing."""
    brier_S, wanted = arm.whole[1], reference.whole[1][-1]
    if brier_S[0] <= wanted:
        return "at most "
    return "" if (brier_S <= wanted).any() else "at least "


def brier_difference(
    arm: Curve, reference: Curve, share: int, seed: int = 0
) -> tuple[float, list[float]]:
    """Brier score of ``arm`` minus that of ``reference`` at a share; interval as above."""

    def difference(rows: NDArray[np.intp], problems: NDArray[np.intp]) -> float:
        return float(arm.mean(rows, problems)[1][share] - reference.mean(rows, problems)[1][share])

    return _with_interval(difference, arm, seed)


def brier(arm: Curve, share: int, seed: int = 0) -> tuple[float, list[float]]:
    """Brier score at a share; interval as above."""
    return _with_interval(lambda r, p: float(arm.mean(r, p)[1][share]), arm, seed)


def _with_interval(
    value: Callable[[NDArray[np.intp], NDArray[np.intp]], float], arm: Curve, seed: int
) -> tuple[float, list[float]]:
    replicates, problems = len(arm.tokens_RS), len(arm.prefixes_P)
    drawn = [value(*draw) for draw in _draws(replicates, problems, seed)]
    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")
    return value(np.arange(replicates), np.arange(problems)), [float(low), float(high)]


def _draws(
    replicates: int, problems: int, seed: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        yield rng.integers(replicates, size=replicates), rng.integers(problems, size=problems)
