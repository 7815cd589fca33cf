"""Calibrate a verifier on one half of validation and report it on the other half."""

from __future__ import annotations

import sys
import zlib
from collections import defaultdict
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torchmetrics.functional import pearson_corrcoef
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from pav.calibrate import fit_calibrator
from pav.data import Example, Scored, score
from pav.labels import LabelSet
from pav.policy import Policy
from pav.tasks.base import Problem, Task
from pav.verifier import ORM, Card, HeadedTrunk

PICKS = ("last", "min", "vote", ORM)
_MODES = (("plain", False), ("surprise", True))


def fit_and_report(
    card: Card,
    model: HeadedTrunk,
    examples: list[Example],
    labels: LabelSet,
    policy: Policy,
    task: Task,
    base: str,
) -> Card:
    """The card with calibrators, default pick and validation metrics filled in."""
    scored = score(model, examples, policy, "calibrating")
    fitted = np.array([_first_half(e.problem_id) for e in examples])[scored.example_N]
    calibrators: dict[str, dict[str, Any]] = {}
    surprised: dict[str, dict[str, Any]] = {}
    metrics: dict[str, Any] = {}
    q: dict[tuple[str, str], np.ndarray] = {}
    for h, head in enumerate(card.heads):
        there = scored.n_NH[:, h] > 0
        rows, held = there & fitted, there & ~fitted
        if not there.any():
            _warn(f"no validation label for head {head}: it stays uncalibrated")
        elif not rows.any() or not held.any():
            _warn(f"too few validation problems for head {head}: none is left to report on")
            rows, held = there, np.zeros_like(there)
        logit, k, n = scored.logits_NH[:, h], scored.k_NH[:, h], scored.n_NH[:, h]
        for mode, with_surprise in _MODES:
            features = scored.surprise_NF if with_surprise else None
            calibrator = fit_calibrator(
                logit[rows], None if features is None else features[rows], k[rows], n[rows]
            )
            (surprised if with_surprise else calibrators)[head] = asdict(calibrator)
            values = calibrator(logit, features)
            q[head, mode] = values
            metrics[f"{head}/{mode}"] = _metrics(values[held], k[held], n[held])
    metrics["slips"] = _slip_table(card, examples, scored, q, ~fitted, policy, labels, task)
    card = replace(card, calibrators=calibrators, surprise_calibrators=surprised)
    if card.recipe == "pav":
        picks = _picks(card, examples, scored, q, ~fitted, policy, labels, task)
        metrics["picks"] = picks
        card = replace(card, pick=default_pick(picks))
    return replace(card, validation=metrics)


def _first_half(problem_id: str) -> bool:
    return zlib.crc32(problem_id.encode()) % 2 == 0


def _warn(message: str) -> None:
    print(f"WARNING: {message}; raise validation_problems", file=sys.stderr)


def _metrics(q: np.ndarray, k: np.ndarray, n: np.ndarray) -> dict[str, float]:
    """AUC at 0.5, correlation, Brier against the constant predictor, calibration error.

    What is not defined (one class, constant values, no rows) is NaN.
    """
    names = ("auc", "correlation", "brier", "brier_constant", "calibration_error")
    if not len(q):
        return {"rows": 0} | dict.fromkeys(names, float("nan"))
    target = k / n
    high = (target >= 0.5).astype(int)
    weights = n / n.sum()
    constant = float((weights * target).sum())
    values, labels = torch.tensor(q), torch.tensor(high)
    correlation = float("nan")
    if np.ptp(q) > 0 and np.ptp(target) > 0:
        correlation = float(pearson_corrcoef(values, torch.tensor(target, dtype=values.dtype)))
    return {
        "rows": len(q),
        "auc": float(binary_auroc(values, labels)) if 0 < high.sum() < len(high) else float("nan"),
        "correlation": correlation,
        "brier": float((weights * (q - target) ** 2).sum()),
        "brier_constant": float((weights * (constant - target) ** 2).sum()),
        "calibration_error": float(binary_calibration_error(values, labels, n_bins=10)),
    }


def _slip_table(
    card: Card,
    examples: list[Example],
    scored: Scored,
    q: dict[tuple[str, str], np.ndarray],
    held: np.ndarray,
    policy: Policy,
    labels: LabelSet,
    task: Task,
) -> dict[str, Any]:
    """AUC of "no slip so far", by step and by kind of first slip, where the task knows the truth.

    By kind: steps that hold a first slip of that kind against clean steps (the last step, which
    ends the trace, excluded unless the head is the ORM's).
    """
    slips = getattr(task, "slips", None)
    if slips is None:
        return {}
    problems = {t.problem_id: Problem(t.problem_id, t.question, t.gold) for t in labels.traces}
    kinds: list[str | None] = []
    first: list[bool] = []
    for example in examples:
        ids, start, texts = example.ids[example.prompt_length :], 0, []
        for end in example.ends:
            texts.append(policy.text(ids[start:end]))
            start = end
        found = [None, *slips(texts, problems[example.problem_id])]
        kinds += found
        first += [
            kind is not None and (j == 0 or found[j - 1] is None) for j, kind in enumerate(found)
        ]
    # score() sorts examples by length; go by (example, step) instead of by order.
    offset = np.concatenate([[0], np.cumsum([len(e.positions_P) for e in examples])])
    row = offset[scored.example_N] + scored.step_N
    kind_N = np.array([k or "" for k in kinds], dtype=object)[row]
    first_N = np.array(first)[row]
    ends_N = np.array([len(e.ends) for e in examples])[scored.example_N] == scored.step_N
    table: dict[str, Any] = {}
    for head in card.heads:
        scope = held & (ends_N if head == ORM else (scored.step_N > 0))
        for mode, _ in _MODES:
            values = q[head, mode]
            clean = scope & (kind_N == "")
            by: dict[str, float] = {"all": _auc(values, clean, scope & (kind_N != ""))}
            for step in range(1, 9):
                at = scope & (scored.step_N == step)
                by[f"step {step}"] = _auc(values, at & (kind_N == ""), at & (kind_N != ""))
            for kind in sorted(set(kind_N) - {""}):
                slipped = scope & (kind_N == kind)
                by[kind] = _auc(values, clean, slipped & (first_N | (head == ORM)))
            table[f"{head}/{mode}"] = by
    return table


def _auc(values: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> float:
    if positive.sum() < 5 or negative.sum() < 5:
        return float("nan")
    chosen = np.concatenate([values[positive], values[negative]])
    label = np.concatenate([np.ones(positive.sum()), np.zeros(negative.sum())]).astype(int)
    return float(binary_auroc(torch.tensor(chosen), torch.tensor(label)))


def _picks(
    card: Card,
    examples: list[Example],
    scored: Scored,
    q: dict[tuple[str, str], np.ndarray],
    held: np.ndarray,
    policy: Policy,
    labels: LabelSet,
    task: Task,
) -> dict[str, float]:
    """Accuracy of every pick rule among the seed traces of held-out validation problems."""
    outcome = {(t.problem_id, tuple(t.ids)): t for t in labels.traces if not t.truncated}
    q_base, q_orm = q[card.base_head, "surprise"], q[ORM, "surprise"]
    groups: dict[str, list[tuple[float, float, float, str | None, bool]]] = defaultdict(list)
    rows: dict[int, list[int]] = defaultdict(list)
    for r in np.flatnonzero(held):
        rows[int(scored.example_N[r])].append(int(r))
    for i, own in rows.items():
        example = examples[i]
        trace = outcome.get((example.problem_id, tuple(example.ids[example.prompt_length :])))
        if trace is None:
            continue
        ordered = sorted(own, key=lambda r: int(scored.step_N[r]))
        steps = q_base[ordered]
        groups[example.problem_id].append(
            (
                float(steps[-1]),
                float(steps[1:].min()),
                float(q_orm[ordered[-1]]),
                trace.answer,
                trace.correct,
            )
        )
    right: dict[str, list[bool]] = defaultdict(list)
    for group in groups.values():
        right["last"].append(max(group, key=lambda g: g[0])[4])
        right["min"].append(max(group, key=lambda g: g[1])[4])
        right[ORM].append(max(group, key=lambda g: g[2])[4])
        votes: dict[str | None, float] = defaultdict(float)
        for last, _, _, answer, _ in group:
            if answer is not None:  # unparsable solutions do not vote together
                votes[answer] += last
        winner = max(votes, key=lambda a: votes[a]) if votes else None
        right["vote"].append(any(g[4] for g in group if g[3] == winner))
    accuracies = {pick: float(np.mean(right[pick])) if right[pick] else 0.0 for pick in PICKS}
    return {**accuracies, "problems": float(len(groups))}


def default_pick(picks: dict[str, float]) -> str:
    """The ORM head (the paper's rule), unless another rule wins by over a standard error.

    The last Q alone is a poor pick after a search that ranked by it: it is over-optimised.

    Args:
        picks: accuracy of every rule, and the number of ``problems`` behind it.
    """
    best = max(PICKS, key=lambda p: picks[p])
    noise = (picks[ORM] * (1 - picks[ORM]) / max(1.0, picks["problems"])) ** 0.5
    return best if picks[best] > picks[ORM] + noise else ORM


def print_report(card: Card) -> None:
    """The validation metrics as tables."""
    console = Console()
    table = Table(title="validation, the half that calibration did not see")
    columns = ("head / calibrator", "rows", "AUC", "corr", "Brier", "constant", "cal. error")
    for column in columns:
        table.add_column(column)
    for name, m in card.validation.items():
        if isinstance(m, dict) and "auc" in m:
            table.add_row(
                name,
                str(m["rows"]),
                *(
                    f"{m[k]:.3f}"
                    for k in ("auc", "correlation", "brier", "brier_constant", "calibration_error")
                ),
            )
    console.print(table)
    slips = card.validation.get("slips") or {}
    if slips:
        names = list(next(iter(slips.values())))
        table = Table(title="AUC of 'no slip so far': all, by step, by kind of first slip")
        table.add_column("")
        for column in slips:
            table.add_column(column)
        for name in names:
            table.add_row(
                name, *(f"{by[name]:.3f}" if by[name] == by[name] else "-" for by in slips.values())
            )
        console.print(table)
    if "picks" in card.validation:
        picks = ", ".join(f"{k} {card.validation['picks'][k]:.3f}" for k in PICKS)
        console.print(f"final pick among seed traces: {picks}; default: {card.pick}")
