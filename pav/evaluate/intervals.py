"""95% intervals of what :mod:`pav.evaluate.metrics` measures: problems are resampled, their rows
together.

Prefixes and steps of one problem are no independent evidence. Every figure is computed anew on each
draw of the problems, from sums over problems where it is made of sums.

Axes: N rows (prefixes, or steps between two), P problems, R draws, G distinct values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pav.core.statistics import resampled
from pav.evaluate.metrics import BINS, Array, Counts

DRAWS = 500
# Cells of the (draws, rows) tables that ranks are counted in.
_CELLS = 10_000_000
Rows = NDArray[np.bool_]
Intervals = dict[str, list[float]]


@dataclass(frozen=True)
class Draws:
    """How often each problem is in each draw of as many problems.

    Args:
        problem_N: problem of every row.
    """

    problem_N: NDArray[Any]
    index_N: NDArray[np.intp] = field(init=False)
    weight_RP: Array = field(init=False)

    def __post_init__(self) -> None:
        names, index_N = np.unique(self.problem_N, return_inverse=True)
        weight_RP = np.zeros((DRAWS, len(names)))
        if len(names):
            weight_RP += resampled(len(names), DRAWS)
        object.__setattr__(self, "index_N", index_N.ravel())
        object.__setattr__(self, "weight_RP", weight_RP)

    def sums(self, *columns_N: Array) -> list[Array]:
        """(R,) sum over the rows of every draw, of each column."""
        problems = self.weight_RP.shape[1]
        by_problem = [np.bincount(self.index_N, c, minlength=problems) for c in columns_N]
        return list((self.weight_RP @ np.stack(by_problem, axis=1)).T)


def value_intervals(q_N: Array, counts: Counts, problem_N: NDArray[Any]) -> Intervals:
    """Intervals of the figures of :func:`pav.evaluate.metrics.value_metrics`, and of
    ``brier_gain``: how far Brier is below that of a constant. NaN where there is no row.
    """
    draws = Draws(problem_N)
    k, n, share = counts.k_N, counts.n_N, counts.share_N
    bin_N = np.clip(np.ceil(q_N * BINS) - 1, 0, BINS - 1).astype(int)
    inside = [bin_N == b for b in range(BINS)]
    total, right, q_sum, squares = draws.sums(n, k, n * q_N, k * (q_N - 1) ** 2 + (n - k) * q_N**2)
    in_bin = draws.sums(*(n * i for i in inside))
    off = draws.sums(*((n * q_N - k) * i for i in inside))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, brier = right / total, squares / total
        constant = mean * (1 - mean)
        parts = [np.where(b > 0, o**2 / b, 0.0) for b, o in zip(in_bin, off, strict=True)]
        reliability = np.sum(parts, axis=0) / total
        found = {
            "mean_q": q_sum / total,
            "mean_right": mean,
            "auc": _aucs(draws, q_N, share >= 0.5),
            "correlation": _correlations(draws, q_N, share),
            "spearman": _rank_correlations(draws, q_N, share),
            "brier": brier,
            "brier_constant": constant,
            "reliability": reliability,
            "resolution": reliability + constant - brier,
            "calibration_error": np.sum(np.abs(off), axis=0) / total,
            "brier_gain": constant - brier,
        }
    return ends(found)


def auc_interval(values: Array, high: Rows, problem_N: NDArray[Any]) -> list[float]:
    """Interval of :func:`pav.evaluate.metrics.auc`."""
    return ends({"auc": _aucs(Draws(problem_N), values, high)})["auc"]


def advantage_intervals(
    a_N: Array, before: Counts, after: Counts, problem_N: NDArray[Any]
) -> Intervals:
    """Intervals of the figures of :func:`pav.evaluate.metrics.advantage_metrics`."""
    draws = Draws(problem_N)
    change = after.share_N - before.share_N
    moved = change != 0
    agree = np.where(a_N == 0, 0.5, np.sign(a_N) == np.sign(change)) * moved
    agreed, counted = draws.sums(agree, moved.astype(float))
    with np.errstate(invalid="ignore", divide="ignore"):
        sign = agreed / counted
    return ends({"sign": sign, "correlation": _correlations(draws, a_N, change)})


def location_intervals(hit_T: Rows, faulty_T: Rows, problem_T: NDArray[Any]) -> Intervals:
    """Intervals of :func:`pav.evaluate.first_error.first_error_metrics`; T solutions."""
    columns = (hit_T & faulty_T, faulty_T, hit_T & ~faulty_T, ~faulty_T)
    found, wrong, none, clean = Draws(problem_T).sums(*(c.astype(float) for c in columns))
    with np.errstate(invalid="ignore", divide="ignore"):
        error, kept = found / wrong, none / clean
    return ends({"error": error, "clean": kept, "f1": harmonic_mean(error, kept)})


def harmonic_mean(a: Array | float, b: Array | float) -> Array:
    """2ab / (a + b), the F1 of two shares: 0 where both are 0, NaN where one is unknown."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(a + b > 0, 2 * a * b / (a + b), a * b)


def ends(by_name: Mapping[str, Array]) -> Intervals:
    """[low, high] of every figure, draws that do not define it left out; NaN where none does."""
    found = {}
    for name, draws_R in by_name.items():
        defined = draws_R[np.isfinite(draws_R)]
        low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (np.nan, np.nan)
        found[name] = [float(low), float(high)]
    return found


def _correlations(draws: Draws, x: Array, y: Array) -> Array:
    """(R,) Pearson's."""
    if not len(x):
        return np.full(DRAWS, np.nan)
    x, y = x - x.mean(), y - y.mean()
    count, sx, sy, sxx, syy, sxy = draws.sums(np.ones(len(x)), x, y, x * x, y * y, x * y)
    return _pearson(count, sx, sy, sxx, syy, sxy)


def _pearson(count: Array, sx: Array, sy: Array, sxx: Array, syy: Array, sxy: Array) -> Array:
    vx, vy = sxx - sx**2 / count, syy - sy**2 / count
    enough = (vx > 1e-12 * count) & (vy > 1e-12 * count)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(enough, (sxy - sx * sy / count) / np.sqrt(vx * vy), np.nan)


def _weights(draws: Draws) -> list[Array]:
    """(some of R, N) how often a row is in a draw, a part of the draws at a time."""
    rows = len(draws.index_N)
    size = max(1, _CELLS // max(1, rows))
    return [draws.weight_RP[start : start + size, draws.index_N] for start in range(0, DRAWS, size)]


def _aucs(draws: Draws, values: Array, high: Rows) -> Array:
    """(R,) areas under the ROC curve; equal values count half."""
    if not 0 < high.sum() < len(high):
        return np.full(DRAWS, np.nan)
    order = np.argsort(values, kind="stable")
    start_G = np.flatnonzero(np.r_[True, np.diff(values[order]) > 0])
    out = []
    for part_RN in _weights(draws):
        weight = part_RN[:, order]
        positive, negative = (
            np.add.reduceat(weight * is_in[order], start_G, axis=1) for is_in in (high, ~high)
        )
        below = np.cumsum(negative, axis=1) - negative / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            out.append((positive * below).sum(1) / (positive.sum(1) * negative.sum(1)))
    return np.concatenate(out)


def _rank_correlations(draws: Draws, x: Array, y: Array) -> Array:
    """(R,) Spearman's: Pearson's of the ranks within each draw, ties sharing theirs."""
    if len(x) < 2:
        return np.full(DRAWS, np.nan)
    out = []
    for weight in _weights(draws):
        count = weight.sum(1)
        rx, ry = (_ranks(weight, v) - (count[:, None] + 1) / 2 for v in (x, y))
        sums = [(weight * v).sum(1) for v in (rx, ry, rx * rx, ry * ry, rx * ry)]
        out.append(_pearson(count, *sums))
    return np.concatenate(out)


def _ranks(weight_RN: Array, values: Array) -> Array:
    """(R, N) mean rank of every row where row i stands there ``weight`` times."""
    order = np.argsort(values, kind="stable")
    start_G = np.flatnonzero(np.r_[True, np.diff(values[order]) > 0])
    size_RG = np.add.reduceat(weight_RN[:, order], start_G, axis=1)
    rank_RG = np.cumsum(size_RG, axis=1) - (size_RG - 1) / 2
    group_N = np.empty(len(values), dtype=np.intp)
    group_N[order] = np.repeat(np.arange(len(start_G)), np.diff(np.r_[start_G, len(values)]))
    return np.asarray(rank_RG[:, group_N])
