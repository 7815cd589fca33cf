"""Where a solution first goes wrong, by a verifier's Q and by what is known.

Axes: T solutions, P steps of a solution (padded), N scored prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pav.core.heads import LIK, ORM
from pav.evaluate.intervals import harmonic_mean, location_intervals
from pav.evaluate.metrics import NAN, Array
from pav.evaluate.scored_labels import MODES, Held, Rows, ScoredLabels, Values
from pav.labels.examples import Example


def first_error(
    scores: ScoredLabels, q: Values, held: Held, fitted: Rows, kinds: list[list[str | None]] | None
) -> dict[str, Any]:
    """Where a solution first goes wrong: by the truth, or the first step with no right rollout.

    The threshold is settled on the solutions of the rows ``fitted``, which are not reported on.
    From counts a solution that ends right has no error; one that ends wrong is judged only where
    every step but the last has two rollouts.
    """
    scored = scores.scored
    width = max((len(e.ends) for e in scores.examples), default=0)
    shape = (len(scores.examples), width)
    after = scored.step_N > 0
    at = scored.example_N[after], scored.step_N[after] - 1
    fitted_T = np.zeros(shape[0], dtype=bool)
    fitted_T[scored.example_N[fitted]] = True
    problem_T = np.array([e.problem_id for e in scores.examples])
    found: dict[str, Any] = {"truth": "counts" if kinds is None else "slips"}
    for head in scores.heads:
        if head == ORM or (kinds is None and head.startswith(LIK)):
            continue  # a likelihood is never zero
        held_T = np.zeros(shape[0], dtype=bool)
        held_T[scored.example_N[held[head]]] = True
        if kinds is not None:
            first_T = np.array(
                [next((j for j, kind in enumerate(of) if kind is not None), 0) for of in kinds]
            )
            known_T = np.ones(shape[0], dtype=bool)
        else:
            k_TP, n_TP = np.zeros(shape), np.zeros(shape)
            k_TP[at], n_TP[at] = (
                c[after] for c in (scores.counts[head].k_N, scores.counts[head].n_N)
            )
            exact_TP = np.zeros(shape, dtype=bool)
            exact_TP[at] = scores.counts[head].exact_N[after]
            first_T, known_T, n_TP = _first_zero(k_TP, n_TP, exact_TP, scores.examples)
            found[f"{head}/halves"] = halves_agree(
                k_TP[known_T & (first_T > 0)], n_TP[known_T & (first_T > 0)]
            )
        for mode in MODES:
            q_TP = np.full(shape, np.nan)
            q_TP[at] = q[head, mode][after]
            settle, report = known_T & fitted_T, known_T & held_T & ~fitted_T
            threshold = first_error_threshold(q_TP[settle], first_T[settle])
            said = q_TP[report], first_T[report], threshold
            found[f"{head}/{mode}"] = {
                "threshold": threshold,
                **first_error_metrics(*said),
                "ci95": location_intervals(located(*said), first_T[report] > 0, problem_T[report]),
            }
    return found


def _first_zero(
    k_TP: NDArray[Any], n_TP: NDArray[Any], exact_TP: Rows, examples: Sequence[Example]
) -> tuple[NDArray[np.intp], Rows, NDArray[Any]]:
    """(first step with no right rollout or 0, whether it can be told, n with outcomes left out)."""
    length_T = np.array([len(e.ends) for e in examples])
    inside_TP = np.arange(k_TP.shape[1])[None] < length_T[:, None]
    right_T = (exact_TP & (k_TP > 0)).any(1)
    none_TP = inside_TP & (n_TP > 0) & (k_TP == 0)
    first_T = np.asarray(np.where(right_T | ~none_TP.any(1), 0, none_TP.argmax(1) + 1))
    told_T = (~inside_TP | exact_TP | (n_TP >= 2)).all(1) & exact_TP.any(1)
    known_T = np.asarray(right_T | told_T, dtype=np.bool_)
    return first_T, known_T, np.where(exact_TP, 0, n_TP)


def first_error_threshold(q_TP: Array, first_T: NDArray[np.intp]) -> float:
    """The threshold on Q with the best F1 of :func:`first_error_metrics`."""
    values = q_TP[np.isfinite(q_TP)]
    if not len(values):
        return 0.5
    tried = np.unique(np.quantile(values, np.linspace(0, 1, 101)))
    scores = [first_error_metrics(q_TP, first_T, float(t))["f1"] for t in tried]
    return 0.5 if np.isnan(scores).all() else float(tried[int(np.nanargmax(scores))])


def first_error_metrics(
    q_TP: Array, first_T: NDArray[np.intp], threshold: float
) -> dict[str, float]:
    """Location of the first error: the first step after which Q is below ``threshold``.

    Args:
        q_TP: Q after step 1, 2, ...; NaN where a trace has no such step.
        first_T: number of the first wrong step, 0 where there is none.
        threshold: on Q.

    Returns:
        ``error``: share of faulty traces whose first error is found; ``clean``: share of the others
        in which none is; ``f1``: their harmonic mean, as ProcessBench has it.
    """
    faulty = first_T > 0
    hit = located(q_TP, first_T, threshold)
    error = float(hit[faulty].mean()) if faulty.any() else NAN
    clean = float(hit[~faulty].mean()) if (~faulty).any() else NAN
    return {
        "traces": len(q_TP),
        "error": error,
        "clean": clean,
        "f1": float(harmonic_mean(error, clean)),
    }


def located(q_TP: Array, first_T: NDArray[np.intp], threshold: float) -> Rows:
    """(T,) whether the first step after which Q is below ``threshold`` is the first wrong one."""
    below = q_TP < threshold  # NaN is not
    return np.asarray(np.where(below.any(1), below.argmax(1) + 1, 0) == first_T)


def halves_agree(k_TP: Array, n_TP: Array, seed: int = 0) -> float:
    """How often two halves of the rollouts name the same first step without a right rollout.

    A measure of how well counts locate an error; a lower limit to what a perfect predictor reaches.

    Args:
        k_TP: right rollouts after step 1, 2, ... of faulty traces.
        n_TP: rollouts; below 2 where a half would be empty, 0 after the end.
        seed: of the split.
    """
    usable = (n_TP >= 2) | (n_TP == 0)
    rows = usable.all(1) & (n_TP > 0).any(1)
    if not rows.any():
        return NAN
    k, n = k_TP[rows].astype(int), n_TP[rows].astype(int)
    half = n // 2
    rng = np.random.default_rng(seed)
    one = rng.hypergeometric(k, n - k, half)
    first = []
    for right in (one, k - one):
        none = (right == 0) & (n > 0)
        first.append(np.where(none.any(1), none.argmax(1) + 1, 0))
    return float((first[0] == first[1]).mean())
