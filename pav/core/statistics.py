"""Intervals and tests over problems. Axes: P problems, S seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
# Problems below which a split is warned of.
FEW = 50


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval over problems."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def few(count: int, split: str, wanted: int | None = None) -> str | None:
    """What to warn of where figures of a split stand on too few problems; None where they do not.

    Args:
        count: problems that there are.
        split: what they are called.
        wanted: how many were asked for, where that is known.
    """
    more = f" ({wanted} were asked for)" if wanted is not None and wanted > count else ""
    said = f"{count} {split} problem{'s' * (count != 1)}{more}"
    if count >= FEW:
        return said if more else None
    return f"{said}, fewer than {FEW}: figures of so few say little"


def bootstrap(values_PS: NDArray[np.float64], seed: int = 0) -> Interval:
    """Mean of (P, S) values; problems are resampled, their seeds stay together.

    A difference of two methods on the same problems and seeds gives the paired interval.
    """
    per_problem = np.asarray(values_PS, dtype=np.float64).mean(axis=1)
    rng = np.random.default_rng(seed)
    count = len(per_problem)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 500):
        draws = rng.integers(0, count, size=(500, count))
        means[start : start + 500] = per_problem[draws].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(per_problem.mean()), float(low), float(high))


def resampled(problems: int, draws: int, seed: int = 0) -> NDArray[np.int64]:
    """(draws, P) how often each problem is in each bootstrap sample of all problems."""
    share = np.full(problems, 1 / problems)
    return np.random.default_rng(seed).multinomial(problems, share, size=draws)


def mcnemar(a_PS: NDArray[np.float64], b_PS: NDArray[np.float64]) -> float:
    """Two-sided exact McNemar p of two methods on the same problems and seeds.

    Only problems on which they differ count: are they won by either as often as by a fair coin?
    With several seeds a problem is won by whoever is right more often, so that the seeds of a
    problem do not pass for independent evidence.
    """
    from scipy.stats import binomtest

    difference = np.asarray(a_PS).mean(axis=1) - np.asarray(b_PS).mean(axis=1)
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
