"""What the study reports of a verifier, each figure with a bootstrap over problems.

Axes: N scored positions, Q problems, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pav.judged import Judged, slips_of
from pav.metrics import Array, auc
from pav.verifier import ORM

RESAMPLES = 200
Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Figure:
    """One number of one head's values.

    Attributes:
        head: whose values.
        rows: positions it is about.
        of: (values N, chosen rows) -> number.
    """

    head: str
    rows: Rows
    of: Callable[[Array, Rows], float]


def figures_of(judged: Judged, held_N: NDArray[np.bool_]) -> dict[str, Figure]:
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
        found[f"no slip, equal depth {head}"] = _at_depth(
            head, np.flatnonzero(scope), kind_N == "", scored.step_N
        )
        # Clean steps against those that hold the first slip of a solution, as pav.measure has it.
        for kind in ("any first slip", *sorted(set(kind_N) - {""})):
            slipped = scope & first_N & (True if kind == "any first slip" else kind_N == kind)
            if slipped.sum() >= 10:
                found[f"{kind} {head}"] = _auc(head, np.flatnonzero(clean | slipped), clean)
    return found


def _auc(head: str, rows: Rows, high_N: NDArray[np.bool_]) -> Figure:
    return Figure(head, rows, lambda q_N, at: auc(q_N[at], high_N[at]))


def _at_depth(head: str, rows: Rows, high_N: NDArray[np.bool_], step_N: NDArray[np.intp]) -> Figure:
    """AUC over pairs of prefixes with as many steps: what a search compares."""

    def of(q_N: Array, at: Rows) -> float:
        right = pairs = 0.0
        for step in np.unique(step_N[at]):
            own = at[step_N[at] == step]
            high = int(high_N[own].sum())
            if 0 < high < len(own):
                count = high * (len(own) - high)
                right, pairs = right + count * auc(q_N[own], high_N[own]), pairs + count
        return right / pairs if pairs else float("nan")

    return Figure(head, rows, of)


def _brier(head: str, rows: Rows, share_N: Array, n_N: Array) -> Figure:
    def of(q_N: Array, at: Rows) -> float:
        q, y = q_N[at], share_N[at]
        return float(np.average(y * (q - 1) ** 2 + (1 - y) * q**2, weights=n_N[at]))

    return Figure(head, rows, of)


def _over(head: str, rows: Rows, share_N: Array, n_N: Array) -> Figure:
    return Figure(
        head, rows, lambda q_N, at: float(np.average(q_N[at] - share_N[at], weights=n_N[at]))
    )


def _correlation(head: str, rows: Rows, before_N: Rows, change_N: Array) -> Figure:
    def of(q_N: Array, at: Rows) -> float:
        return float(np.corrcoef(q_N[at] - q_N[before_N[at]], change_N[at])[0, 1])

    return Figure(head, rows, of)


def resampled(problem_N: NDArray[np.intp], rows: Rows, seed: int = 0) -> list[Rows]:
    """``rows`` of every resample of the problems: the same problems for all figures."""
    rng = np.random.default_rng(seed)
    present = np.unique(problem_N)
    of = {p: rows[problem_N[rows] == p] for p in present}
    draws = rng.choice(present, size=(RESAMPLES, len(present)))
    return [np.concatenate([of[p] for p in draw]) for draw in draws]


def interval(values_R: Array) -> tuple[float, float]:
    """The 95% interval of resampled values."""
    low, high = np.nanquantile(values_R, [0.025, 0.975])
    return float(low), float(high)
