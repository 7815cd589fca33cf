"""Guard rails: what the figures of a run say is going wrong with it.

A guard is a function of the history of metrics (a dict per iteration, newest last, as in
``metrics.jsonl``). It says in one line what it sees and what to do, or nothing. Three of them end
the run, because nothing that follows could be of use: numbers that are not finite, traces cut by
the length cap, and held-out accuracy that is lost. The others are said once each; ``--guards stop``
lets them end the run, too. A policy that the engine does not serve as it is trained ends the run
whatever the guards are (:func:`pav.rl.sync.check_mismatch`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pav.core.files import json_rows, json_text
from pav.core.printable import one_line
from pav.core.statistics import FEW
from pav.rl.config import RlConfig

Metrics = dict[str, float]
WARNINGS = "warnings.jsonl"

# Figures of the policy and its update; a verifier that is fitted again has figures of its own.
OWN = ("train/", "update/", "mismatch/")
# Iterations whose mean is compared, at the start and now: a batch of a few hundred traces is noisy.
WINDOW = 5
# Growth of steps that is no drift any more where accuracy stays: the policy that learned to restate
# went from 9 to 20 steps in ten iterations, one that learned to solve the problems stayed within 1.
FILLER_GROWTH = 1.5
# Steps or tokens per trace beyond this factor, either way, are another way to write.
DRIFT = 2.0
# Share of steps that say nothing (at most a token and its delimiter), or what an earlier one said;
# the shipped policies have less than 2% of either.
IDLE_STEPS = 0.1
# Entropy left, of that of the start: below it the traces of a group are nearly alike.
ENTROPY_LEFT = 0.1
# Share of groups whose traces are all the same text.
ALIKE = 0.5
# Mean difference of log-probabilities that is never mere rounding in float32 (measured: 1e-7 to
# 1e-5), and growth over the start that rounding of bfloat16 (.04, from the start) never shows.
MISMATCH = 1e-3
MISMATCH_GROWTH = 3.0
# Share of scored states at which a calibrator reads what the labels hardly showed; on the tape 4%
# of those of the policy that was labelled.
OUT_OF_RANGE = 0.15
# Held-out accuracy left, of the best: below it twice running, and beyond both intervals, the run is
# lost.
ACCURACY_LEFT = 0.5


@dataclass(frozen=True)
class Alarm:
    """What a guard says.

    Attributes:
        iteration: at which it first said so.
        name: of the guard.
        line: what is seen, and what to do.
        stops: whether it ends the run.
    """

    iteration: int
    name: str
    line: str
    stops: bool


def alarms(history: Sequence[Metrics], config: RlConfig) -> list[Alarm]:
    """All that is to be said of a run as it stands.

    Args:
        history: metrics of every iteration so far, newest last; held-out figures may stand in any.
        config: settings of the run.
    """
    if not history or config.guards == "off":
        return []
    now = int(history[-1]["iteration"])
    return [
        Alarm(now, guard.__name__, line, config.guards == "stop" or guard in ENDING)
        for guard in (*ENDING, *WARNING)
        if (line := guard(history, config))
    ]


def watch(directory: Path, history: Sequence[Metrics], config: RlConfig) -> str:
    """Say what is new, and write it to ``warnings.jsonl``.

    Args:
        directory: of the run.
        history: as in :func:`alarms`.
        config: likewise.

    Returns:
        Why the run ends; empty where it goes on.
    """
    found = alarms(history, config)
    said = {alarm.name for alarm in read_alarms(directory)}
    new = [alarm for alarm in found if alarm.name not in said]
    if new:
        with (directory / WARNINGS).open("a", encoding="utf-8") as stream:
            stream.writelines(json_text(asdict(alarm), None) + "\n" for alarm in new)
    for alarm in new:
        if not alarm.stops:
            print(f"WARNING: {alarm.name}: {one_line(alarm.line)}", file=sys.stderr, flush=True)
    return next((f"{alarm.name}: {alarm.line}" for alarm in found if alarm.stops), "")


def read_alarms(directory: Path) -> list[Alarm]:
    """What was said of a run so far; a torn last line is left out."""
    return [Alarm(**row) for row in json_rows(directory / WARNINGS)]


def not_finite(history: Sequence[Metrics], config: RlConfig) -> str:
    """A figure that is no number: the weights are lost."""
    wrong = [k for k, v in history[-1].items() if k.startswith(OWN) and not math.isfinite(v)]
    if not wrong:
        return ""
    return (
        f"{', '.join(wrong[:3])} {'is' if len(wrong) == 1 else 'are'} not finite: the policy is "
        "damaged; lower lr or max_grad_norm, or use --precision 32-true"
    )


def truncated(history: Sequence[Metrics], config: RlConfig) -> str:
    """Too many traces are cut by the length cap, which says nothing of how they would end."""
    share = _now(history, "train/truncated")
    if not share > config.truncation_limit:
        return ""
    return (
        f"the length cap cuts {share:.0%} of the traces (truncation_limit "
        f"{config.truncation_limit:g}); raise --sampler.max_length, or add --length_penalty"
    )


def accuracy_lost(history: Sequence[Metrics], config: RlConfig) -> str:
    """Held-out accuracy is less than half of the best, and beyond both intervals.

    Twice running, and of enough problems: the best of many evaluations is a lucky one, and the
    interval of a few problems that are all wrong has no width.
    """
    held_out = _held_out(history)
    if not held_out or config.eval_problems < FEW:
        return ""
    best, now = max(held_out, key=lambda row: row["accuracy"]), held_out[-1]
    half, low = ACCURACY_LEFT * best["accuracy"], best["accuracy_low"]
    if not all(r["accuracy"] < half and r["accuracy_high"] < low for r in held_out[-2:]):
        return ""
    return (
        f"held-out accuracy fell from {_at(best)} to {_at(now)}; go on from the best policy with a "
        "lower lr, a larger kl or a smaller alpha (best/ holds it)"
    )


def gamed(history: Sequence[Metrics], config: RlConfig) -> str:
    """The dense reward rises while held-out accuracy falls (paper, Section 5: "rephrase")."""
    held_out = _held_out(history)
    if not held_out:
        return ""
    best, now = max(held_out, key=lambda row: row["accuracy"]), held_out[-1]
    if not now["accuracy"] < best["accuracy_low"]:
        return ""
    for name in ("train/dense_per_step", "train/dense"):
        values = [(r["iteration"], r[name]) for r in history if name in r]
        then = [v for i, v in values if abs(i - best["iteration"]) <= WINDOW // 2]
        if then and _now(history, name) > max(then):
            return (
                f"{name} rose from {np.mean(then):.3f} to {_now(history, name):.3f} while held-out "
                f"accuracy fell from {_at(best)} to {_at(now)}: the verifier is gamed; lower "
                "--alpha, use --dense record, or train the verifier on traces of this policy"
            )
    return ""


def filler_steps(history: Sequence[Metrics], config: RlConfig) -> str:
    """Steps grow in number and accuracy does not: they are there for the reward alone."""
    growth, held_out = _growth(history, "train/steps"), _held_out(history)
    if not (growth >= FILLER_GROWTH and len(held_out) > 1):
        return ""
    start, now = held_out[0], held_out[-1]
    if now["accuracy"] > start["accuracy_high"]:
        return ""
    return (
        f"steps per trace went from {_start(history, 'train/steps'):.1f} to "
        f"{_now(history, 'train/steps'):.1f} and held-out accuracy did not rise ({_at(start)}, "
        f"{_at(now)}): steps that add nothing may earn more than steps that try; use "
        "--dense record, a prover that is no better than the policy, or a smaller --alpha"
    )


def drift(history: Sequence[Metrics], config: RlConfig) -> str:
    """Traces are twice as long as at the start, or half as long."""
    for name in ("train/steps", "train/tokens"):
        growth = _growth(history, name)
        if growth >= DRIFT or growth <= 1 / DRIFT:
            return (
                f"{name} went from {_start(history, name):.1f} to {_now(history, name):.1f}; read "
                "the sample traces in rl.html; a larger kl holds the policy nearer to its start"
            )
    return ""


def idle_steps(history: Sequence[Metrics], config: RlConfig) -> str:
    """Steps that are empty, or the same as an earlier step of their trace."""
    said = []
    for name, kind in (("train/empty_steps", "empty"), ("train/repeated_steps", "repeated")):
        share = _now(history, name)
        if share > IDLE_STEPS:
            said.append(
                f"{share:.0%} of the steps are {kind} ({_start(history, name):.0%} at first)"
            )
    if not said:
        return ""
    return f"{' and '.join(said)}; --dense record pays nothing for them"


def entropy_lost(history: Sequence[Metrics], config: RlConfig) -> str:
    """The policy has become nearly certain of every token."""
    left = _growth(history, "update/entropy")
    if not left < ENTROPY_LEFT:
        return ""
    return (
        f"entropy fell from {_start(history, 'update/entropy'):.3g} to "
        f"{_now(history, 'update/entropy'):.3g} nats a token: samples no longer differ; lower lr, "
        "or raise kl or group"
    )


def alike(history: Sequence[Metrics], config: RlConfig) -> str:
    """The traces of a group are the same text, so that there is nothing to choose from."""
    share = _now(history, "train/alike")
    if not share > ALIKE:
        return ""
    return (
        f"in {share:.0%} of the groups all traces are the same text: check that the sampler's "
        "temperature is above 0; raise kl, or give harder problems"
    )


def dead_groups(history: Sequence[Metrics], config: RlConfig) -> str:
    """No group holds both a right and a wrong trace, so that outcomes teach nothing."""
    last = _rows(history, "train/dead_groups")[-WINDOW:]
    if len(last) < WINDOW or min(last) < 1:
        return ""
    right = _now(history, "train/accuracy")
    other = "easier" if right < 0.5 else "harder"
    return (
        f"in the last {WINDOW} iterations the outcomes of every group were all the same "
        f"({right:.1%} of the traces right): only the dense reward teaches; raise group, give "
        f"{other} problems, or start from a policy that pav.sft made"
    )


def mismatch(history: Sequence[Metrics], config: RlConfig) -> str:
    """Engine and trainer drift apart, slowly enough to stay below ``mismatch_limit``."""
    now = _now(history, "mismatch/mean")
    if not (now > MISMATCH and _growth(history, "mismatch/mean") > MISMATCH_GROWTH):
        return ""
    return (
        f"the mean difference of log-probabilities between engine and trainer grew from "
        f"{_start(history, 'mismatch/mean'):.2g} to {now:.2g} (the run ends at mismatch_limit "
        f"{config.mismatch_limit:g}); serve the policy in float32, or add --importance_cap 2"
    )


def out_of_range(history: Sequence[Metrics], config: RlConfig) -> str:
    """The verifier is asked of text that is unlike all of its labels."""
    share = _now(history, "verifier/out_of_range")
    if not share > OUT_OF_RANGE:
        return ""
    return (
        f"at {share:.0%} of the steps the verifier reads what its labels never showed "
        f"({_start(history, 'verifier/out_of_range'):.1%} at first): its Q means little there; "
        "label traces of this policy and train the verifier again, or raise kl"
    )


ENDING = (not_finite, truncated, accuracy_lost)
WARNING = (
    gamed, filler_steps, drift, idle_steps, entropy_lost, alike, dead_groups, mismatch,
    out_of_range,
)  # fmt: skip


def _rows(history: Sequence[Metrics], name: str) -> list[float]:
    """A figure of every iteration that has it."""
    return [row[name] for row in history if name in row]


def _start(history: Sequence[Metrics], name: str) -> float:
    """Mean over the first iterations."""
    found = _rows(history, name)[:WINDOW]
    return float(np.mean(found)) if found else math.nan


def _now(history: Sequence[Metrics], name: str) -> float:
    """Mean over the last iterations."""
    found = _rows(history, name)[-WINDOW:]
    return float(np.mean(found)) if found else math.nan


def _growth(history: Sequence[Metrics], name: str) -> float:
    """Now over start; NaN, which no limit is below or above, before they are apart."""
    start = _start(history, name)
    if len(_rows(history, name)) < 2 * WINDOW or not start > 0:
        return math.nan
    return _now(history, name) / start


def _held_out(history: Sequence[Metrics]) -> list[Metrics]:
    """Iterations whose policy was evaluated."""
    return [row for row in history if "accuracy" in row]


def _at(row: Metrics) -> str:
    return f"{row['accuracy']:.3f} at iteration {row['iteration']:.0f}"
