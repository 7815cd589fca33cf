"""``data_gen.rollouts --dry_run``: what a run would take, measured on a few of its problems."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import numpy as np

from data_gen.config import RolloutsConfig
from data_gen.engines import loaded
from data_gen.inspect.watch import watch_for
from data_gen.labeler import Labeler, PlannedTrace, RolloutPolicy, label
from data_gen.store import Store
from pav.core.journal import JOURNAL
from pav.core.printable import one_line
from pav.core.steps import Stepper
from pav.grading.sandbox import guarded
from pav.labels.tables import Completion, Trace
from pav.policy.opening import block
from pav.policy.policy import Policy

PROBLEMS = 32


@dataclass(frozen=True)
class Pilot:
    """What labelling a few solutions gave.

    Attributes:
        traces: the solutions.
        completions: their rollouts.
        factor: rollouts of the run for one of the pilot.
        seconds: that it took.
        tokens: sampled.
        journal_bytes: size of its journal.
        table_bytes: size of its tables.
    """

    traces: list[Trace]
    completions: list[Completion]
    factor: int
    seconds: float
    tokens: int
    journal_bytes: int
    table_bytes: int


def print_plan(
    config: RolloutsConfig, policies: list[Policy], rounds: list[list[PlannedTrace]]
) -> None:
    """Run a pilot in a temporary directory and print what the whole run would take."""
    with loaded(config, policies) as rollout_policies:
        pilot = _pilot(config, rollout_policies, _first_of_each_writer(rounds))
    traces = sum(map(len, rounds))
    problems = len({t.problem.id for traces in rounds for t in traces})
    # Step 0 is shared by the solutions of a problem; what else they share is left out of account.
    first = [c for c in pilot.completions if not c.prefix_ids]
    rest = [c for c in pilot.completions if c.prefix_ids]
    per_problem = problems / len({t.problem_id for t in pilot.traces})
    per_trace = traces / len(pilot.traces)
    labelled = per_problem * len({c.prefix_key for c in first})
    labelled += per_trace * len({c.prefix_key for c in rest})
    rollouts = (per_problem * len(first) + per_trace * len(rest)) * pilot.factor
    tokens = traces * _mean([len(t.ids) for t in pilot.traces] if not config.traces_from else [0])
    tokens += per_problem * pilot.factor * sum(len(c.ids) for c in first)
    tokens += per_trace * pilot.factor * sum(len(c.ids) for c in rest)
    records = len(pilot.traces) + len(pilot.completions)
    share = (traces + rollouts) / records
    # Given solutions without rollouts take no tokens at all.
    hours = tokens * pilot.seconds / max(1, pilot.tokens) / 3600
    steps = [len(t.step_ends) for t in pilot.traces]
    per_step = sum(t.step_ends[-1] for t in pilot.traces if t.step_ends) / max(1, sum(steps))
    empty = empty_share([t.ids for t in pilot.traces], policies[0].stepper)
    _print_solutions(config, policies[0], pilot)
    print(
        f"pilot: {len(pilot.traces)} solutions, {len(pilot.completions)} rollouts, "
        f"{pilot.tokens} tokens in {pilot.seconds:.1f} s ({pilot.tokens / pilot.seconds:.0f} "
        "tokens/s)\n"
        f"  {_mean(steps):.1f} steps per trace, {per_step:.1f} tokens per step, {empty:.1%} of the "
        "steps empty\n"
        f"plan: {problems} problems, {traces} traces, at most {labelled:.0f} prefixes, "
        f"{rollouts:.0f} rollouts, {tokens:.3g} tokens\n"
        f"  disk: {pilot.table_bytes * share / 1e6:.1f} MB of tables, and "
        f"{pilot.journal_bytes * share / 1e6:.1f} MB of journal until they are sealed\n"
        f"  time: {hours:.2f} hours at the pilot's rate (a long run keeps the engine fuller)"
    )
    if config.hours is not None:
        share = min(1.0, config.hours / max(hours, 1e-9))
        print(f"  --hours {config.hours}: about {share * len(rounds):.1f} of {len(rounds)} rounds")
    print("nothing was written; the same command without --dry_run starts the run")


def _print_solutions(config: RolloutsConfig, policy: Policy, pilot: Pilot) -> None:
    """How the pilot's solutions and rollouts ended, and two of the solutions in full."""
    watch = watch_for(config.task, stops=False)
    sampled = [t for t in pilot.traces if not config.traces_from]
    for what, records in (("solutions", sampled), ("rollouts", pilot.completions)):
        if not records:
            continue
        for record in records:
            watch.count(record)
        print(
            f"pilot's {what}: {_mean([r.truncated for r in records]):.1%} truncated, "
            f"{_mean([r.correct for r in records]):.1%} right, "
            f"{_mean([r.answer is None for r in records]):.1%} without an answer"
        )
    # Of different writers, where there are some.
    for trace in pilot.traces[:1] + pilot.traces[1:][-1:]:
        state = "truncated" if trace.truncated else "right" if trace.correct else "wrong"
        print(
            f"a solution of {trace.policy}: {state}, answer {trace.answer!r} for {trace.gold!r}, "
            f"{len(trace.step_ends)} steps\n{block(policy.text(trace.ids), most=None)}"
        )
    if doubt := watch.doubt():
        print(f"WARNING: {one_line(doubt)}", file=sys.stderr)


def _first_of_each_writer(rounds: list[list[PlannedTrace]]) -> list[list[PlannedTrace]]:
    """The first solution of every writer for the first problems, as one round a writer."""
    by_writer: dict[str, list[PlannedTrace]] = {}
    for traces in rounds:
        for trace in traces:
            chosen = by_writer.setdefault(trace.writer, [])
            if trace.index == 0 and len(chosen) < PROBLEMS:
                chosen.append(trace)
    return list(by_writer.values())


def _pilot(
    config: RolloutsConfig, rollout_policies: list[RolloutPolicy], rounds: list[list[PlannedTrace]]
) -> Pilot:
    plan, factor = config.plan, 1
    # What a strategy spends depends on outcomes; without one, a rollout tells what many cost.
    if plan.strategy == "all_prefixes" and not plan.branches and plan.n_mc > 1:
        plan, factor = replace(plan, n_mc=1), plan.n_mc
    with TemporaryDirectory() as name:
        directory = Path(name)
        with (
            Store(directory, {}) as store,
            guarded(config.task, None, config.grade_timeout) as grader,
        ):
            started = monotonic()
            labeler = Labeler(grader, rollout_policies, plan, config.seed, store)
            label(labeler, rounds, config.concurrency)
            seconds = monotonic() - started
            journal_bytes = (directory / JOURNAL).stat().st_size
            store.seal({r.name: "" for r in rollout_policies})
            table_bytes = sum(p.stat().st_size for p in directory.glob("*/*.parquet"))
        return Pilot(
            list(store.traces.values()),
            list(store.completions.values()),
            factor,
            seconds,
            sum(r.engine.usage.generated for r in rollout_policies),
            journal_bytes,
            table_bytes,
        )


def empty_share(solutions: Sequence[Sequence[int]], stepper: Stepper) -> float:
    """Share of delimiters with nothing but space since the last one: they end no step."""
    delimiters = empty = 0
    for ids in solutions:
        start = 0
        for i, token in enumerate(ids):
            if token in stepper.delimiter_ids:
                delimiters += 1
                empty += all(t in stepper.blank_ids for t in ids[start : i + 1])
                start = i + 1
    return empty / delimiters if delimiters else 0.0


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
