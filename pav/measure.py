"""What a verifier's values are worth on labels: by head, by step, and against what n allows.

Everything here is about *distinct* prefixes: one that stands in many solutions (step 0 in all of
them) counts once. Figures are plain data, so that they go into a checkpoint and its ``.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pav.ceilings import MIN_ROWS, advantage_ceilings, ceilings
from pav.first_error import first_error
from pav.judged import MODES, Held, Judged, Rows, Values, slips_of
from pav.metrics import advantage_metrics, auc, reliability_bins, value_metrics
from pav.verifier import ORM

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


def measure(judged: Judged, q: Values, held: Held, fitted: Rows) -> dict[str, Any]:
    """All figures on the rows ``held`` (by head); thresholds are settled on the rows ``fitted``.

    Keys: ``<head>/<mode>`` and ``<head>/ceiling`` (:func:`pav.metrics.value_metrics`, by step under
    ``steps``), ``advantage``, ``first_error`` and, where the task knows the truth, ``slips``.
    """
    found: dict[str, Any] = {}
    advantages: dict[str, Any] = {}
    for head in judged.heads:
        rows = _distinct(judged, held[head] & (judged.counts[head].n_N > 0))
        steps = judged.scored.step_N[rows]
        labelled = judged.counts[head][rows]
        for mode in MODES:
            values = q[head, mode][rows]
            bins = reliability_bins(values, labelled) if len(rows) else {}
            found[f"{head}/{mode}"] = value_metrics(values, labelled) | {
                "bins": {name: _short(column) for name, column in bins.items()},
                "steps": _by_step(
                    steps, _STEP_COLUMNS, lambda s, v=values, c=labelled: value_metrics(v[s], c[s])
                ),
            }
        found[f"{head}/ceiling"] = ceilings(labelled) | {
            "steps": _by_step(steps, _STEP_COLUMNS, lambda s, c=labelled: ceilings(c[s]))
        }
        if head != ORM:
            advantages |= _advantages(judged, q, held[head], head)
    found["advantage"] = advantages
    kinds = slips_of(judged)
    found["first_error"] = first_error(judged, q, held, fitted, kinds)
    found["slips"] = {} if kinds is None else _slip_table(judged, q, held, kinds)
    return found


def _distinct(judged: Judged, rows: Rows) -> NDArray[np.intp]:
    """Indices of ``rows``, every prefix once."""
    where = np.flatnonzero(rows)
    return where[np.sort(np.unique(judged.keys_N[where], return_index=True)[1])]


def _short(values: Any) -> list[float]:
    """Four digits: these go into checkpoints."""
    return [float(f"{v:.4g}") for v in values]


def _by_step(step_N: NDArray[Any], columns: Sequence[str], of: Any) -> dict[str, list[float]]:
    """Columns of figures with a row per step; steps with few prefixes are left out."""
    numbers = [s for s in np.unique(step_N) if (step_N == s).sum() >= MIN_ROWS]
    rows = [of(step_N == s) for s in numbers]
    return {
        "step": [int(s) for s in numbers],
        **{name: _short(row.get(name, np.nan) for row in rows) for name in columns},
    }


def _advantages(judged: Judged, q: Values, held: Rows, head: str) -> dict[str, Any]:
    """Advantages of steps between two labelled prefixes."""
    n_N = judged.counts[head].n_N
    rows = _distinct(
        judged, held & (judged.scored.step_N > 0) & (n_N > 0) & (n_N[judged.before_N] > 0)
    )
    before, after = judged.counts[head][judged.before_N[rows]], judged.counts[head][rows]
    steps = judged.scored.step_N[rows]
    found: dict[str, Any] = {}
    for mode in MODES:
        values = q[head, mode]
        a = values[rows] - values[judged.before_N[rows]]
        found[f"{head}/{mode}"] = advantage_metrics(a, before, after) | {
            "steps": _by_step(
                steps,
                _ADVANTAGE_COLUMNS,
                lambda s, a=a: advantage_metrics(a[s], before[s], after[s]),
            )
        }
    found[f"{head}/ceiling"] = advantage_ceilings(before, after) | {
        "steps": _by_step(
            steps, _ADVANTAGE_COLUMNS, lambda s: advantage_ceilings(before[s], after[s])
        )
    }
    return found


def _slip_table(
    judged: Judged, q: Values, held: Held, kinds: list[list[str | None]]
) -> dict[str, Any]:
    """AUC of "no slip so far", by step and by kind of first slip.

    By kind: steps that hold a first slip of that kind against clean steps (the last step, which
    ends the trace, excluded unless the head is the ORM's).
    """
    scored = judged.scored
    kind_N = np.array(
        [kinds[e][s] or "" for e, s in zip(scored.example_N, scored.step_N, strict=True)],
        dtype=object,
    )
    first_N = (kind_N != "") & (kind_N[judged.before_N] == "")
    ends_N = np.array([len(e.ends) for e in judged.examples])[scored.example_N] == scored.step_N
    table: dict[str, Any] = {}
    for head in judged.heads:
        scope = held[head] & (ends_N if head == ORM else (scored.step_N > 0))
        for mode in MODES:
            values = q[head, mode]
            clean = scope & (kind_N == "")
            by: dict[str, float] = {"all": _auc_of(values, clean, scope & (kind_N != ""))}
            for step in range(1, 9):
                at = scope & (scored.step_N == step)
                by[f"step {step}"] = _auc_of(values, at & (kind_N == ""), at & (kind_N != ""))
            for kind in sorted(set(kind_N) - {""}):
                slipped = scope & (kind_N == kind)
                by[kind] = _auc_of(values, clean, slipped & (first_N | (head == ORM)))
            table[f"{head}/{mode}"] = by
    return table


def _auc_of(values: NDArray[Any], positive: Rows, negative: Rows) -> float:
    if positive.sum() < 5 or negative.sum() < 5:
        return float("nan")
    rows = positive | negative
    return auc(values[rows], positive[rows])
