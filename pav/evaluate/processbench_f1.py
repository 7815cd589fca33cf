"""First wrong steps from scores, their F1, and the threshold that makes it largest.

Source: ProcessBench, arXiv 2412.06559, section 2. Axes: T solutions, R ranges of thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pav.core.errors import UserError
from pav.evaluate.intervals import harmonic_mean
from pav.evaluate.processbench_data import CORRECT

# Predicted for a solution that the trunk cannot read: right for none.
UNREADABLE = -2


@dataclass(frozen=True)
class Scores:
    """What a verifier says of a solution.

    Attributes:
        steps: one score per step; None if the trunk cannot read the solution.
        is_changed: whether the tokenizer does not give back the text.
    """

    steps: NDArray[np.float64] | None
    is_changed: bool = False


def first_wrong(scores: Scores, threshold: float) -> int:
    """Index of the first step scored below ``threshold``, -1 if there is none."""
    if scores.steps is None:
        return UNREADABLE
    below = np.flatnonzero(scores.steps < threshold)
    return int(below[0]) if len(below) else CORRECT


def f1_row(labels: Sequence[int], predicted: Sequence[int]) -> dict[str, Any]:
    """Accuracies and F1 of a subset; None where a subset lacks one of the two kinds."""
    is_right = [a == b for a, b in zip(labels, predicted, strict=True)]
    wrong = [r for r, label in zip(is_right, labels, strict=True) if label != CORRECT]
    correct = [r for r, label in zip(is_right, labels, strict=True) if label == CORRECT]
    error_accuracy = sum(wrong) / len(wrong) if wrong else None
    correct_accuracy = sum(correct) / len(correct) if correct else None
    f1 = None
    if error_accuracy is not None and correct_accuracy is not None:
        f1 = float(harmonic_mean(error_accuracy, correct_accuracy))
    return {
        "n_error": len(wrong),
        "n_correct": len(correct),
        "error_accuracy": error_accuracy,
        "correct_accuracy": correct_accuracy,
        "f1": f1,
        "unreadable": sum(p == UNREADABLE for p in predicted),
    }


def pick_threshold(labels: Sequence[int], scores: Sequence[Scores]) -> float:
    """The threshold of the largest F1: the middle of the widest range of thresholds that has it.

    A prediction changes only at a score, so that every range between neighbouring scores is tried.

    Raises:
        UserError: if there are only solutions with, or only solutions without an error.
    """
    if not any(label == CORRECT for label in labels) or all(label == CORRECT for label in labels):
        raise UserError(
            "pick_on needs solutions with an error (label 0 or more) and without (label -1); "
            "give another file, or a threshold"
        )
    # A solution is judged rightly by the thresholds in (low, high].
    low_T, high_T = np.full(len(labels), np.inf), np.full(len(labels), -np.inf)
    for i, (label, score_of) in enumerate(zip(labels, scores, strict=True)):
        if score_of.steps is None:
            continue
        before = score_of.steps if label == CORRECT else score_of.steps[:label]
        low_T[i] = -np.inf if label == CORRECT else score_of.steps[label]
        high_T[i] = before.min(initial=np.inf)
    values = np.unique(np.concatenate([s.steps for s in scores if s.steps is not None]))
    if not len(values):
        raise UserError("pick_on: no solution can be read by the trunk; give a threshold")
    # Ranges (edge, next edge]; beyond the lowest and highest score nothing changes any more.
    edges = np.concatenate([[values[0] - 1.0], values, [values[-1] + 1.0]])
    is_correct = np.array(labels) == CORRECT
    f1s = []
    for top in edges[1:]:
        right = (low_T < top) & (top <= high_T)
        f1s.append(harmonic_mean(float(right[~is_correct].mean()), float(right[is_correct].mean())))
    f1_R = np.array(f1s, dtype=float)
    best = np.flatnonzero(f1_R == f1_R.max())
    runs = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    widest = max(runs, key=lambda run_: edges[run_[-1] + 1] - edges[run_[0]])
    return float((edges[widest[0]] + edges[widest[-1] + 1]) / 2)
