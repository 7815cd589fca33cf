"""What a verifier's values are worth on labels: by head, by step, and against what n allows.

Everything here is about *distinct* prefixes: one that stands in many solutions (step 0 in all of
them) counts once. Figures are plain data, so that they go into a checkpoint and its ``.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pav.core.heads import ORM
from pav.evaluate.ceilings import MIN_ROWS, advantage_ceilings, ceilings
from pav.evaluate.first_error import first_error
from pav.evaluate.intervals import advantage_intervals, auc_interval, value_intervals
from pav.evaluate.metrics import advantage_metrics, auc, reliability_bins, value_metrics
from pav.evaluate.scored_labels import MODES, Held, Rows, ScoredLabels, Values, slips_of

_STEP_COLUMNS = (
    "rows",
    "mean_q",
    "mean_right",
    "auc",
    "spearman",
    "brier",
    "reliability",
    "calibration_error",
)
_ADVANTAGE_COLUMNS = ("rows", "sign", "correlation")


def measure(scores: ScoredLabels, q: Values, held: Held, fitted: Rows) -> dict[str, Any]:
    """All figures on the rows ``held`` (by head); thresholds are settled on the rows ``fitted``.

    Keys: ``<head>/<mode>`` and ``<head>/ceiling`` (:func:`pav.evaluate.metrics.value_metrics`, by
    step under ``steps``), ``advantage``, ``first_error`` and, where the task knows the truth,
    ``slips``. What has ``ci95`` has 95% intervals there, over ``problems``
    (:mod:`pav.evaluate.intervals`); ``slips_ci95`` are those of the slips.
    """
    found: dict[str, Any] = {}
    problem_N = _problems(scores)
    advantages: dict[str, Any] = {}
    for head in scores.heads:
        rows = _distinct(scores, held[head] & (scores.counts[head].n_N > 0))
        steps = scores.scored.step_N[rows]
        labelled, problem = scores.counts[head][rows], problem_N[rows]
        for mode in MODES:
            values = q[head, mode][rows]
            bins = reliability_bins(values, labelled) if len(rows) else {}
            of_steps = _by_step(
                steps, _STEP_COLUMNS, lambda s, v=values, c=labelled: value_metrics(v[s], c[s])
            )
            step_intervals = [
                value_intervals(values[s], labelled[s], problem[s])
                for s in (steps == number for number in of_steps["step"])
            ]
            found[f"{head}/{mode}"] = value_metrics(values, labelled) | {
                "problems": len(np.unique(problem)),
                "ci95": value_intervals(values, labelled, problem),
                "bins": {name: _short(column) for name, column in bins.items()},
                "steps": of_steps
                | {
                    f"{name}_ci95": [_short(interval[name]) for interval in step_intervals]
                    for name in ("auc", "calibration_error")
                },
            }
        found[f"{head}/ceiling"] = ceilings(labelled) | {
            "steps": _by_step(steps, _STEP_COLUMNS, lambda s, c=labelled: ceilings(c[s]))
        }
        if head != ORM:
            advantages |= _advantages(scores, q, held[head], head)
    found["advantage"] = advantages
    kinds = slips_of(scores)
    found["first_error"] = first_error(scores, q, held, fitted, kinds)
    found["slips"], found["slips_ci95"] = (
        ({}, {}) if kinds is None else _slip_tables(scores, q, held, kinds)
    )
    return found


def _problems(scores: ScoredLabels) -> NDArray[Any]:
    """(N,) problem of every scored row."""
    return np.array([e.problem_id for e in scores.examples])[scores.scored.example_N]


def _distinct(scores: ScoredLabels, rows: Rows) -> NDArray[np.intp]:
    """Indices of ``rows``, every prefix once."""
    where = np.flatnonzero(rows)
    return where[np.sort(np.unique(scores.keys_N[where], return_index=True)[1])]


def _short(values: Any) -> list[float]:
    """Four digits: these go into checkpoints."""
    return [float(f"{v:.4g}") for v in values]


def _by_step(step_N: NDArray[Any], columns: Sequence[str], of: Any) -> dict[str, Any]:
    """Columns of figures with a row per step; steps with few prefixes are left out."""
    numbers = [s for s in np.unique(step_N) if (step_N == s).sum() >= MIN_ROWS]
    rows = [of(step_N == s) for s in numbers]
    return {
        "step": [int(s) for s in numbers],
        **{name: _short(row.get(name, np.nan) for row in rows) for name in columns},
    }


def _advantages(scores: ScoredLabels, q: Values, held: Rows, head: str) -> dict[str, Any]:
    """Advantages of steps between two labelled prefixes."""
    n_N = scores.counts[head].n_N
    rows = _distinct(
        scores, held & (scores.scored.step_N > 0) & (n_N > 0) & (n_N[scores.before_N] > 0)
    )
    before, after = scores.counts[head][scores.before_N[rows]], scores.counts[head][rows]
    steps, problem = scores.scored.step_N[rows], _problems(scores)[rows]
    found: dict[str, Any] = {}
    for mode in MODES:
        values = q[head, mode]
        a = values[rows] - values[scores.before_N[rows]]
        found[f"{head}/{mode}"] = advantage_metrics(a, before, after) | {
            "ci95": advantage_intervals(a, before, after, problem),
            "steps": _by_step(
                steps,
                _ADVANTAGE_COLUMNS,
                lambda s, a=a: advantage_metrics(a[s], before[s], after[s]),
            ),
        }
    found[f"{head}/ceiling"] = advantage_ceilings(before, after) | {
        "steps": _by_step(
            steps, _ADVANTAGE_COLUMNS, lambda s: advantage_ceilings(before[s], after[s])
        )
    }
    return found


def _slip_tables(
    scores: ScoredLabels, q: Values, held: Held, kinds: list[list[str | None]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures, intervals): AUC of "no slip so far", by step and by kind of first slip.

    By kind: steps that hold a first slip of that kind against clean steps (the last step, which
    ends the trace, excluded unless the head is the ORM's).
    """
    scored, problem_N = scores.scored, _problems(scores)
    kind_N = np.array(
        [kinds[e][s] or "" for e, s in zip(scored.example_N, scored.step_N, strict=True)],
        dtype=object,
    )
    first_N = (kind_N != "") & (kind_N[scores.before_N] == "")
    ends_N = np.array([len(e.ends) for e in scores.examples])[scored.example_N] == scored.step_N
    table: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for head in scores.heads:
        scope = held[head] & (ends_N if head == ORM else (scored.step_N > 0))
        for mode in MODES:
            values = q[head, mode]
            clean = scope & (kind_N == "")
            compared = {"all": (clean, scope & (kind_N != ""))}
            for step in range(1, 9):
                at = scope & (scored.step_N == step)
                compared[f"step {step}"] = at & (kind_N == ""), at & (kind_N != "")
            for kind in sorted(set(kind_N) - {""}):
                slipped = scope & (kind_N == kind)
                compared[kind] = clean, slipped & (first_N | (head == ORM))
            areas = {k: _auc_of(values, *rows, problem_N) for k, rows in compared.items()}
            table[f"{head}/{mode}"] = {k: value for k, (value, _) in areas.items()}
            intervals[f"{head}/{mode}"] = {k: interval for k, (_, interval) in areas.items()}
    return table, intervals


def _auc_of(
    values: NDArray[Any], positive: Rows, negative: Rows, problem_N: NDArray[Any]
) -> tuple[float, list[float]]:
    if positive.sum() < 5 or negative.sum() < 5:
        return float("nan"), [float("nan")] * 2
    rows = positive | negative
    high = positive[rows]
    return auc(values[rows], high), auc_interval(values[rows], high, problem_N[rows])
