"""Calibrate a verifier on one half of validation and report it on the other half."""

from __future__ import annotations

import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pav.core.heads import ORM
from pav.core.printable import cell, one_line
from pav.core.statistics import bootstrap
from pav.core.tables import wide_console
from pav.evaluate.scored_labels import MODES, score_labels
from pav.evaluate.suite import measure
from pav.labels.examples import Example
from pav.labels.tables import LabelSet
from pav.policy.policy import Policy
from pav.tasks.base import Task
from pav.verifier.calibrate import fit_calibrator
from pav.verifier.checkpoint import VerifierMeta
from pav.verifier.forward import Scored, score
from pav.verifier.pick import Candidate, Pick, pick
from pav.verifier.trunk import HeadedTrunk

PICKS: tuple[Pick, ...] = ("last", "min", "vote", "orm")
# Training solutions that calibrators read, drawn at random: more would cost a forward pass each,
# and teach a hundred weights nothing.
MOST_CALIBRATING = 1000


def fit_and_report(
    card: VerifierMeta,
    model: HeadedTrunk,
    examples: list[Example],
    training: list[Example],
    labels: LabelSet,
    policy: Policy,
    task: Task,
    base: str,
) -> VerifierMeta:
    """The card with calibrators, default pick and validation metrics filled in.

    Calibrators are fitted on one half of the validation ``examples``, and on ``training`` where
    there is any; everything reported is of the other half.
    """
    scored = score(model, examples, policy, "calibrating")
    drawn = np.random.default_rng(0).permutation(len(training))[:MOST_CALIBRATING]
    some = [training[i] for i in sorted(drawn)]
    known = score(model, some, policy, "calibrating") if some else None
    fitted = np.array([first_half(e.problem_id) for e in examples])[scored.example_N]
    calibrators: dict[str, dict[str, Any]] = {}
    surprised: dict[str, dict[str, Any]] = {}
    q: dict[tuple[str, str], np.ndarray] = {}
    held: dict[str, np.ndarray] = {}
    for h, head in enumerate(card.heads):
        there = scored.n_NH[:, h] > 0
        rows, held[head] = there & fitted, ~fitted
        if not there.any():
            _warn(f"no validation label for head {head}: how well it is calibrated is unknown")
        elif not rows.any() or not (there & held[head]).any():
            _warn(f"too few validation problems for head {head}: none is left to report on")
            rows, held[head] = there, np.zeros_like(there)
        sources = [(scored, rows)]
        if known is not None:
            sources.append((known, known.n_NH[:, h] > 0))
        logit, k, n = (
            np.concatenate([getattr(s, name)[at, h] for s, at in sources])
            for name in ("logits_NH", "k_NH", "n_NH")
        )
        surprise_NF = np.concatenate([s.surprise_NF[at] for s, at in sources])
        for mode in MODES:
            seen = surprise_NF if mode == "surprise" else None
            calibrator = fit_calibrator(logit, seen, k, n)
            (surprised if mode == "surprise" else calibrators)[head] = asdict(calibrator)
            q[head, mode] = calibrator(scored.logits_NH[:, h], scored.surprise_NF)
    scores = score_labels(card.heads, examples, scored, labels, policy, task)
    metrics = measure(scores, q, held, fitted)
    metrics["data"] = label_facts(labels)
    card = replace(card, calibrators=calibrators, surprise_calibrators=surprised)
    if card.recipe == "pav" and ORM in card.heads:
        picks = _picks(card, examples, scored, q, ~fitted, labels)
        metrics["picks"] = picks
        card = replace(card, pick=default_pick(picks))
    return replace(card, validation=metrics)


def first_half(problem_id: str) -> bool:
    """Whether calibrators and thresholds are fitted on this validation problem."""
    return zlib.crc32(problem_id.encode()) % 2 == 0


def _warn(message: str) -> None:
    print(f"WARNING: {one_line(message)}; raise validation_problems", file=sys.stderr)


def label_facts(labels: LabelSet) -> dict[str, Any]:
    """How many labels of what kind: what a card says of its data."""
    kinds = Counter((policy, n) for (_, policy), (_, n) in labels.counts.items())
    splits = {t.problem_id: t.split for t in labels.traces}
    return {
        "problems": dict(sorted(Counter(splits.values()).items())),
        "solutions": dict(sorted(Counter(t.policy for t in labels.traces).items())),
        "rollouts": len(labels.completions),
        "prefixes": {
            policy: {str(n): c for (p, n), c in sorted(kinds.items()) if p == policy}
            for policy in labels.policies
        },
    }


def _picks(
    card: VerifierMeta,
    examples: list[Example],
    scored: Scored,
    q: dict[tuple[str, str], np.ndarray],
    held: np.ndarray,
    labels: LabelSet,
) -> dict[str, Any]:
    """Accuracy of every pick rule among the traces of held-out validation problems."""
    outcome = {(t.problem_id, tuple(t.ids)): t for t in labels.traces if not t.truncated}
    q_base, q_orm = q[card.base_head, "surprise"], q[ORM, "surprise"]
    groups: dict[str, list[Candidate]] = defaultdict(list)
    rows: dict[int, list[int]] = defaultdict(list)
    for r in np.flatnonzero(held):
        rows[int(scored.example_N[r])].append(int(r))
    for i, own in rows.items():
        example = examples[i]
        ids = example.ids[example.prompt_length :]
        trace = outcome.get((example.problem_id, tuple(ids)))
        if trace is None:
            continue
        ordered = sorted(own, key=lambda r: int(scored.step_N[r]))
        values = {card.base_head: q_base[ordered].tolist(), ORM: q_orm[ordered].tolist()}
        groups[example.problem_id].append(
            Candidate(ids, example.ends, values, 0.0, True, False, "", trace.answer, trace.correct)
        )
    right: dict[str, list[bool]] = defaultdict(list)
    for group in groups.values():
        for rule in PICKS:
            chosen = pick(group, rule, card.base_head)
            right[rule].append(chosen is not None and group[chosen].correct)
    accuracies: dict[str, float] = {
        rule: float(np.mean(right[rule])) if right[rule] else 0.0 for rule in PICKS
    }
    intervals = {p: bootstrap(np.array([right[p]], dtype=float).T) for p in PICKS if right[p]}
    ci95 = {rule: [interval.low, interval.high] for rule, interval in intervals.items()}
    return {**accuracies, "problems": float(len(groups)), "ci95": ci95}


def default_pick(picks: dict[str, Any]) -> Pick:
    """The ORM head (the paper's rule), unless another rule wins by over a standard error.

    The last Q alone is a poor pick after a search that ranked by it: it is over-optimised.

    Args:
        picks: accuracy of every rule, and the number of ``problems`` behind it.
    """
    best = max(PICKS, key=lambda p: picks[p])
    noise = (picks[ORM] * (1 - picks[ORM]) / max(1.0, picks["problems"])) ** 0.5
    return best if picks[best] > picks[ORM] + noise else ORM


def print_report(card: VerifierMeta, verbose: bool) -> None:
    """The validation metrics as tables (see :func:`print_metrics`)."""
    print_metrics(card.validation, "validation, the half that calibration did not see", verbose)
    if "picks" in card.validation:
        picks = ", ".join(f"{k} {shown(card.validation['picks'], k)}" for k in PICKS)
        print(f"right by final pick among traces: {picks}; default: {one_line(card.pick)}")


_COLUMNS = {
    "rows": "prefixes",
    "auc": "AUC",
    "spearman": "Spearman",
    "brier": "Brier",
    "brier_constant": "constant",
    "reliability": "reliab.",
    "resolution": "resol.",
    "calibration_error": "ECE",
    "sign": "A sign",
    "correlation": "A corr",
}


_SHORT = ("rows", "auc", "brier", "brier_constant", "calibration_error")
_EXPLAINED = {
    "rows": "prefixes that the figures are of; their rollouts are the truth",
    "auc": "chance that a right rollout's prefix has a higher Q than a wrong one's; .5 is a coin",
    "spearman": "rank correlation of Q with the share of right rollouts",
    "brier": "mean squared error of Q against single rollouts: the lower the better",
    "brier_constant": "the Brier score of one Q for all, the mean",
    "reliability": "part of Brier that calibration could mend",
    "resolution": "part of the constant's Brier that Q explains",
    "calibration_error": "mean distance of Q from the share of right rollouts",
    "sign": "steps whose advantage has the right sign: at least, to at most, given the noise",
    "correlation": "of the advantage with the change of the share of right rollouts",
}


def print_metrics(metrics: dict[str, Any], title: str, verbose: bool) -> None:
    """What :func:`pav.evaluate.suite.measure` found, as tables with their columns explained.

    Args:
        metrics: that it found.
        title: of the first table.
        verbose: every calibrator, column, step and kind of slip, and the ceiling that the number
            of rollouts allows; else each head as it is served.
    """
    columns = {k: v for k, v in _COLUMNS.items() if verbose or k in _SHORT}
    console = wide_console(170)
    advantage = metrics.get("advantage", {})
    table = Table(title=cell(title))
    table.add_column("head / calibrator", no_wrap=True)
    for column in columns.values():
        table.add_column(column, justify="right")
    for name, m in metrics.items():
        if not (isinstance(m, dict) and "auc" in m) or not m["rows"]:
            continue
        if name.endswith("/ceiling") and np.isnan(m["brier"]):
            continue
        if not verbose and not name.endswith("/surprise"):
            continue
        # An advantage's correlation stands beside its sign; that of Q is in the file.
        values = m | {"sign": np.nan, "correlation": np.nan} | advantage.get(name, {})
        values["rows"] = m["rows"]
        ci95 = m.get("ci95", {})
        if name in advantage:
            ci95 = ci95 | {
                k: advantage[name].get("ci95", {}).get(k, []) for k in ("sign", "correlation")
            }
        cells = {k: _shown(values[k], ci95.get(k), "\n") for k in columns}
        if "sign" in cells and "sign_low" in values and values["sign"] == values["sign"]:
            cells["sign"] = f"{values['sign_low']:.2f} to {values['sign']:.2f}"
        table.add_row(cell(name), *cells.values())
    console.print(table)
    for key, column in columns.items():
        console.print(cell(f"  {column}: {_EXPLAINED[key]}"))
    console.print(cell("  in brackets: 95% intervals over problems"))
    _print_verdicts(metrics)
    if not verbose:
        return
    noisy = [
        name.removesuffix("/ceiling")
        for name, m in metrics.items()
        if name.endswith("/ceiling")
        and metrics[f"{name.removesuffix('/ceiling')}/plain"]["rows"]
        and np.isnan(m["brier"])
    ]
    if noisy:
        names = one_line(", ".join(noisy))
        print(
            f"no ceiling for {names}: one rollout per prefix says nothing of its noise (n_mc 2 and "
            "more does)"
        )
    _print_steps(console, metrics)
    errors = {n: m for n, m in metrics.get("first_error", {}).items() if isinstance(m, dict)}
    for name, m in errors.items():
        if m["traces"]:
            print(
                f"first error by {metrics['first_error']['truth']}, {one_line(name)}: found in "
                f"{shown(m, 'error')} of faulty solutions, none seen in {shown(m, 'clean')} of "
                f"the others, F1 {shown(m, 'f1')} (Q below {m['threshold']:.2f})"
            )
    _print_slips(console, metrics.get("slips") or {}, metrics.get("slips_ci95") or {})


def shown(figures: dict[str, Any], name: str) -> str:
    """A figure with its 95% interval, where that is known."""
    return _shown(figures[name], figures.get("ci95", {}).get(name))


def _shown(value: float, interval: Sequence[float] | None = None, between: str = " ") -> str:
    if isinstance(value, int):
        return str(value)
    if value != value:
        return "-"
    if not interval or interval[0] != interval[0]:
        return f"{value:.3f}"
    digits = 2 if abs(value) >= 0.1 else 3
    low, high = (f"{end:.{digits}f}".replace("0.", ".", 1) for end in interval)
    return f"{value:.3f}{between}[{low}, {high}]"


def _print_verdicts(metrics: dict[str, Any]) -> None:
    """Of every head whether it is worth more than the mean: what no table says at a glance."""
    for name, m in metrics.items():
        if name.endswith("/surprise") and isinstance(m, dict) and m.get("ci95") and m["rows"]:
            print(f"{one_line(name.removesuffix('/surprise'))}: {verdict(m)}")


def verdict(m: dict[str, Any]) -> str:
    """Whether values are better than a constant, the mean of the labels, by their Brier score.

    They are, or are worse, where the 95% interval of the difference excludes 0.
    """
    low, high = m["ci95"]["brier_gain"]
    gain = m["brier_constant"] - m["brier"]
    against = f"against {m['brier_constant']:.3f}"
    said = f"{abs(gain):.3f} [{abs(low if gain > 0 else high):.3f}, "
    said += f"{abs(high if gain > 0 else low):.3f}] (Brier {m['brier']:.3f} {against})"
    if low > 0:
        return f"better than a constant by {said}"
    if high < 0:
        return f"worse than a constant by {said}"
    return f"no better than a constant: Brier {shown(m, 'brier')} {against}"


def _print_steps(console: Console, metrics: dict[str, Any]) -> None:
    """AUC and calibration error by step, of the better calibrator."""
    columns: dict[str, dict[int, tuple[float, Any]]] = {
        f"{name.split('/surprise')[0]} {label}": dict(
            zip(
                m["steps"]["step"],
                zip_longest(m["steps"][key], m["steps"].get(f"{key}_ci95", [])),
                strict=True,
            )
        )
        for name, m in metrics.items()
        if name.endswith("/surprise") and isinstance(m, dict) and m["rows"] and "q/" in name
        for key, label in (("auc", "AUC"), ("calibration_error", "ECE"))
    }
    steps = sorted({step for column in columns.values() for step in column})
    if not steps:
        return
    table = Table(title="by step, with surprise")
    for heading in ("step", *columns):
        table.add_column(cell(heading), justify="right")
    for step in steps:
        table.add_row(
            str(step), *(_shown(*c.get(step, (np.nan, None)), "\n") for c in columns.values())
        )
    console.print(table)


def _print_slips(console: Console, slips: dict[str, Any], intervals: dict[str, Any]) -> None:
    if not slips:
        return
    names = list(next(iter(slips.values())))
    table = Table(title="AUC of 'no slip so far': all, by step, by kind of first slip")
    table.add_column("")
    for column in slips:
        table.add_column(cell(column))
    for name in names:
        shares = [(by[name], intervals.get(of, {}).get(name)) for of, by in slips.items()]
        table.add_row(cell(name), *(_shown(value, ci95, "\n") for value, ci95 in shares))
    console.print(table)
