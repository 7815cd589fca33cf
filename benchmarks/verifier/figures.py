"""What the study reports of a verifier, each figure with a bootstrap over problems.

Axes: N scored positions, Q problems, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pav.core.heads import ORM
from pav.evaluate.metrics import Array
from pav.evaluate.scored_labels import ScoredLabels, slips_of

RESAMPLES = 200
Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Figure:
    """One number of one head's values.

    Attributes:
        head: whose values.
        rows: positions it is about.
        of: (values N, weights of ``rows``) -> number.
    """

    head: str
    rows: Rows
    of: Callable[[Array, Array], float]


def figures_of(judged: ScoredLabels, held_N: NDArray[np.bool_]) -> dict[str, Figure]:
    """The figures on the rows ``held_N``, by name; every prefix counts once."""
    found: dict[str, Figure] = {}
    scored = judged.scored
    kinds = slips_of(judged)
    assert kinds is not None
    kind_N = np.array(
        [kinds[e][s] or "" for e, s in zip(scored.example_N, scored.step_N, strict=True)],
        dtype=object,
    )
    _, unique = np.unique(judged.keys_N, return_index=True)
    once_N = np.zeros(len(held_N), dtype=bool)
    once_N[unique] = True
    first_N = (kind_N != "") & (kind_N[judged.before_N] == "")
    for head in judged.heads:
        counts = judged.counts[head]
        told_N = held_N & once_N & (counts.n_N > 0)
        share_N = counts.k_N / np.maximum(counts.n_N, 1)
        rows = np.flatnonzero(told_N)
        if head == ORM:
            found["AUC orm"] = _auc(head, rows, share_N >= 0.5)
            continue
        found[f"AUC {head}"] = _auc(head, rows, share_N >= 0.5)
        found[f"Brier {head}"] = _brier(head, rows, share_N, counts.n_N)
        found[f"over-estimate {head}"] = _over(head, rows, share_N, counts.n_N)
        steps = told_N & (scored.step_N > 0) & (counts.n_N[judged.before_N] > 0)
        change_N = share_N - share_N[judged.before_N]
        found[f"A corr {head}"] = _correlation(
            head, np.flatnonzero(steps), judged.before_N, change_N
        )
        scope = held_N & once_N & (scored.step_N > 0)
        clean = scope & (kind_N == "")
        found[f"no slip {head}"] = _auc(head, np.flatnonzero(scope), kind_N == "")
        found[f"no slip, equal depth {head}"] = within(
            head, np.flatnonzero(scope), kind_N == "", scored.step_N
        )
        # Clean steps against those that hold the first slip of a solution, as in
        # pav.evaluate.suite.
        for kind in ("any first slip", *sorted(set(kind_N) - {""})):
            slipped = scope & first_N & (True if kind == "any first slip" else kind_N == kind)
            if slipped.sum() >= 10:
                found[f"{kind} {head}"] = _auc(head, np.flatnonzero(clean | slipped), clean)
    return found


def weighted_auc(q_N: Array, high_N: NDArray[np.bool_], weight_N: Array) -> float:
    """Area under the ROC curve of weighted rows; NaN where one class is missing."""
    _, place_N = np.unique(q_N, return_inverse=True)
    high, low = (np.bincount(place_N, weight_N * side) for side in (high_N, ~high_N))
    pairs = high.sum() * low.sum()
    below = np.cumsum(low) - low / 2
    return float((high * below).sum() / pairs) if pairs else float("nan")


def _auc(head: str, rows: Rows, high_N: NDArray[np.bool_]) -> Figure:
    return Figure(head, rows, lambda q_N, w: weighted_auc(q_N[rows], high_N[rows], w))


def within(head: str, rows: Rows, high_N: NDArray[np.bool_], part_N: NDArray[np.intp]) -> Figure:
    """AUC over pairs of rows in the same part; parts of as many steps are what search compares."""
    parts = [part_N[rows] == part for part in np.unique(part_N[rows])]

    def of(q_N: Array, w: Array) -> float:
        right = pairs = 0.0
        for at in parts:
            high, weight = high_N[rows[at]], w[at]
            count = float((weight * high).sum() * (weight * ~high).sum())
            if count:
                right += count * weighted_auc(q_N[rows[at]], high, weight)
                pairs += count
        return right / pairs if pairs else float("nan")

    return Figure(head, rows, of)


def _brier(head: str, rows: Rows, share_N: Array, n_N: Array) -> Figure:
    y, n = share_N[rows], n_N[rows]

    def of(q_N: Array, w: Array) -> float:
        q = q_N[rows]
        return float(np.average(y * (q - 1) ** 2 + (1 - y) * q**2, weights=w * n))

    return Figure(head, rows, of)


def _over(head: str, rows: Rows, share_N: Array, n_N: Array) -> Figure:
    y, n = share_N[rows], n_N[rows]
    return Figure(head, rows, lambda q_N, w: float(np.average(q_N[rows] - y, weights=w * n)))


def _correlation(head: str, rows: Rows, before_N: Rows, change_N: Array) -> Figure:
    change, before = change_N[rows], before_N[rows]

    def of(q_N: Array, w: Array) -> float:
        both = np.cov(q_N[rows] - q_N[before], change, aweights=w)
        return float(both[0, 1] / np.sqrt(both[0, 0] * both[1, 1]))

    return Figure(head, rows, of)


def resampled(problem_N: NDArray[np.intp], rows: Rows, seed: int = 0) -> list[Rows]:
    """``rows`` of every resample of the problems: the same problems for all figures."""
    rng = np.random.default_rng(seed)
    present = np.unique(problem_N)
    of = {p: rows[problem_N[rows] == p] for p in present}
    draws = rng.choice(present, size=(RESAMPLES, len(present)))
    return [np.concatenate([of[p] for p in draw]) for draw in draws]


def weights(problem_N: NDArray[np.intp], rows: Rows, seed: int = 0) -> Array:
    """(R, rows) weights that stand for the same resamples, for all figures alike."""
    rng = np.random.default_rng(seed)
    present, number = np.unique(problem_N[rows], return_inverse=True)
    draws = rng.integers(len(present), size=(RESAMPLES, len(present)))
    times = np.stack([np.bincount(draw, minlength=len(present)) for draw in draws])
    return times[:, number].astype(np.float64)


def interval(values_R: Array) -> tuple[float, float]:
    """The 95% interval of resampled values."""
    low, high = np.nanquantile(values_R, [0.025, 0.975])
    return float(low), float(high)
