"""``data_gen.regrade DIR``: grade a label run anew after a grader was mended, without sampling."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from data_gen.inspect.card import write_data_card
from data_gen.inspect.health import print_health, write_health
from data_gen.label_run import Run, base_policy, part_of, read_run, task_of
from data_gen.store import MANIFEST, Store
from pav.cli.directories import run_on_directories
from pav.core.errors import UserError
from pav.core.files import json_text, replace_file
from pav.core.progress import Reporter
from pav.core.signals import interruptible
from pav.grading.sandbox import DEFAULT_TIMEOUT, GRADER_LOG, check_timeout, guarded
from pav.labels.tables import Completion, Trace
from pav.tasks.base import Problem, Task, task_spec

Record = TypeVar("Record", Trace, Completion)


@dataclass(frozen=True)
class RegradeConfig:
    """Grade the solutions and rollouts of a label run anew, without sampling.

    Args:
        labels: directory of the run (``data_gen.regrade DIR`` is short for ``--labels DIR``).
        task: the task with its mended grader; by default that of the run, as its code is now. Its
            steps must be the run's.
        grade_timeout: seconds that a grader of your own may take for one answer, which then counts
            as wrong; null for no limit.
    """

    labels: str
    task: Task | None = None
    grade_timeout: float | None = DEFAULT_TIMEOUT

    def __post_init__(self) -> None:
        check_timeout(self.grade_timeout)


def regrade(config: RegradeConfig) -> None:
    """Rewrite grades and counts of a run (see :class:`RegradeConfig`).

    A death on the way leaves some grades old and some new: the same command mends that.
    """
    run = read_run(config.labels)
    if "imported" in run.manifest:
        raise UserError(
            f"labels {config.labels!r} were imported: there are no rollouts to grade; import them "
            "again instead"
        )
    task = _task(config, run)
    policy = base_policy(run, task)
    problems = {
        t.problem_id: Problem(t.problem_id, t.question, t.gold) for t in run.traces.values()
    }
    log = run.directory / GRADER_LOG
    with (
        interruptible(),
        Store(run.directory, run.manifest) as store,
        guarded(task, log, config.grade_timeout) as grader,
    ):
        total = len(store.traces) + len(store.completions)
        with Reporter("regrading", total, "solutions") as reporter:

            def graded(records: Iterable[tuple[Record, list[int]]], done: int) -> list[Record]:
                out = []
                for record, ids in records:
                    grade = grader.grade(policy.text(ids), problems[record.problem_id])
                    correct = grade.correct and not record.truncated
                    out.append(replace(record, answer=grade.answer, correct=correct))
                    reporter.update(done + len(out))
                return out

            old_traces = list(store.traces.values())
            traces = graded(((t, t.ids) for t in old_traces), 0)
            old_completions = list(store.completions.values())
            completions = graded(((c, c.prefix_ids + c.ids) for c in old_completions), len(traces))
        store.traces.update((t.trace_id, t) for t in traces)
        store.completions.update(((c.prefix_key, c.policy, c.index), c) for c in completions)
        changed = traces != old_traces or completions != old_completions
        store.seal(run.policies, changed, part_of(run).owed)
        manifest = run.manifest | json.loads(
            json_text({"task": task.fingerprint, "task_spec": task_spec(task)})
        )
        if manifest != run.manifest:
            replace_file(run.directory / MANIFEST, json_text(manifest))
        print(f"regraded {len(traces)} traces and {len(completions)} rollouts in {config.labels}")
        _changes("traces", old_traces, traces)
        _changes("rollouts", old_completions, completions)
        flipped = Counter(
            (c.prefix_key, c.policy)
            for c, old in zip(completions, old_completions, strict=True)
            for _ in range(c.correct != old.correct)
        )
        print(f"  labels: {len(flipped)} counts hold a changed grade")
        after = Run(run.directory, manifest, store.traces, store.completions, seconds=store.seconds)
        print_health(write_health(after), run.directory)
        write_data_card(after)


def _task(config: RegradeConfig, run: Run) -> Task:
    task = task_of(run, config.task)
    now = task_spec(task)["init_args"]["step_rule"]
    then = run.manifest["task_spec"]["init_args"]["step_rule"]
    if now != then:
        raise UserError(
            f"task.step_rule is {now}, the labels have {then}; regrading cannot cut steps anew: "
            "give the run's rule"
        )
    return task


def _changes(what: str, old: list[Record], new: list[Record]) -> None:
    pairs = list(zip(old, new, strict=True))
    risen = sum(b.correct and not a.correct for a, b in pairs)
    fallen = sum(a.correct and not b.correct for a, b in pairs)
    read = sum(a.answer != b.answer for a, b in pairs)
    print(
        f"  {what}: {risen + fallen} grades changed ({risen} wrong -> right, {fallen} right -> "
        f"wrong), {read} answers are read differently"
    )


def main() -> None:
    """Entry point of ``data_gen.regrade``."""
    run_on_directories(regrade, RegradeConfig, "data_gen.regrade")


if __name__ == "__main__":
    main()
