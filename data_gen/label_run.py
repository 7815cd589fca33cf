"""A label run as the tools read it: finished or running, never locked, never changed."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_gen.store import read_manifest
from data_gen.strategies import next_rollouts, plan_of
from pav.core.errors import UserError
from pav.core.printable import one_line
from pav.core.steps import Stepper, StepRule
from pav.labels.check import check_ids
from pav.labels.files import SOURCES, demand
from pav.labels.tables import Completion, Key, Trace, count, own_endings, read_rows
from pav.labels.unfinished import Part, lacking, said
from pav.policy.opening import task_option
from pav.policy.policy import (
    Policy,
    PolicyConfig,
    load_policy,
    tokenizer_fingerprint,
    vocabulary_size,
)
from pav.tasks.base import Task
from pav.verifier.checkpoint import prompt_from, resolve_task


@dataclass(frozen=True)
class Run:
    """What a label run holds.

    Attributes:
        directory: where it lies.
        manifest: what it is.
        traces: solutions by trace id.
        completions: rollouts by (prefix key, policy, index).
        pace: (seconds worked on the run, tokens) of every rollout that is not sealed yet.
        seconds: seconds that the run has been worked on; 0 if it was not written down.
        solutions: solutions that it is to have; None if it was not written down.
        sealed: whether all of it is in the tables.
        owed: solutions that were not finished when it was sealed; None if it was not written down.
    """

    directory: Path
    manifest: dict[str, Any]
    traces: dict[str, Trace] = field(default_factory=dict)
    completions: dict[Key, Completion] = field(default_factory=dict)
    pace: list[tuple[float, int]] = field(default_factory=list)
    seconds: float = 0.0
    solutions: int | None = None
    sealed: bool = True
    owed: int | None = None

    @property
    def policies(self) -> dict[str, str]:
        """Rollout policy name -> fingerprint, the base first."""
        return dict(self.manifest["rollout_policies"])

    @property
    def base(self) -> str:
        """Name of the base policy."""
        return policy_config(self.manifest).label

    @property
    def counts(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(prefix key, policy) -> (k, n), as training reads them."""
        return count(self.completions.values(), own_endings(self.manifest, self.traces.values()))

    @property
    def generated(self) -> int:
        """Tokens sampled, those of seeds that the run did not sample itself left out."""
        own = sum(len(t.ids) for t in self.traces.values() if t.policy in self.policies)
        return own + sum(len(c.ids) for c in self.completions.values())


def read_run(directory: str | Path) -> Run:
    """Read a label run, what its journal holds included. It may be written to meanwhile.

    Raises:
        UserError: if the directory is none.
    """
    where = Path(directory)
    manifest = read_manifest(where)
    demand(manifest, (*SOURCES, "rollout_policies"), f"{where}/manifest.json")
    rows = read_rows(where)
    seconds, pace = 0.0, []
    for entry in rows.journal:
        seconds = entry.get("t") or seconds
        if entry["kind"] == "completion":
            pace.append((seconds, len(entry["record"]["ids"])))
    return Run(
        where, manifest, rows.traces, rows.completions, pace, seconds, rows.solutions,
        rows.sealed, rows.owed,
    )  # fmt: skip


def part_of(run: Run, stepper: Stepper | None = None) -> Part:
    """How far a run is.

    Args:
        run: the run.
        stepper: what cuts its solutions; without it, branches that are owed are not seen.
    """
    solutions = max(run.solutions or 0, len(run.traces))
    if run.owed is not None:
        return Part(str(run.directory), run.manifest, solutions, run.owed)
    done = len(run.traces)
    if not run.manifest.keys() & {"imported", "merged"}:
        plan = plan_of(run.manifest)
        done = sum(
            not next_rollouts(plan, t, run.completions, stepper) for t in run.traces.values()
        )
    return Part(str(run.directory), run.manifest, solutions, solutions - done)


def warn_unfinished(run: Run, stepper: Stepper | None = None) -> None:
    """Say what a run lacks, where it lacks something."""
    if lack := said(lacking([part_of(run, stepper)])):
        print(f"WARNING: labels are not complete: {one_line(lack)}", file=sys.stderr)


def policy_config(manifest: dict[str, Any]) -> PolicyConfig:
    """The base policy that a manifest names."""
    values = manifest["policy"]
    return PolicyConfig(**{**values, "prompt": prompt_from(values["prompt"])})


def base_policy(run: Run, task: Task) -> Policy:
    """The base policy of a run; its tokenizer is that of all solutions.

    Raises:
        UserError: if the model is gone, or has another tokenizer by now.
    """
    policy = load_policy(policy_config(run.manifest), task.step_rule)
    if tokenizer_fingerprint(policy.tokenizer) != run.manifest["tokenizer"]:
        raise UserError(
            f"labels {str(run.directory)!r} were made with another tokenizer than "
            f"{policy.path!r} has now; put the old one back"
        )
    known = vocabulary_size(policy.path)
    check_ids(run.traces.values(), run.completions.values(), known, repr(str(run.directory)))
    return policy


def stepper_of(run: Run) -> Stepper:
    """What cuts the solutions of a run into steps; needs its base policy's tokenizer, no task.

    Raises:
        UserError: if the model is gone.
    """
    rule = StepRule(**run.manifest["task_spec"]["init_args"]["step_rule"])
    return load_policy(policy_config(run.manifest), rule).stepper


def task_of(run: Run, given: Task | None) -> Task:
    """The task of a run; one that is not built in has to be given."""
    return resolve_task(run.manifest["task_spec"], given, f"labels {str(run.directory)!r}")


def print_next(run: Run) -> None:
    """Print what to do with the labels that a run of data_gen.rollouts has made."""
    manifest, directory = run.manifest, shlex.quote(str(run.directory))
    if manifest["shard"] is not None:
        output = shlex.quote(str(run.directory.parent))
        command = f"data_gen.merge {output}/shard-* --output {output}_merged"
        print(f"next, when all shards are there: {command}")
    elif manifest["branches"]:
        print(f"next: data_gen.select_prover {directory}")
    elif not manifest["n_mc"] and manifest["strategy"] != "adaptive":
        print(f"next: data_gen.likelihood {directory}{task_option(manifest['task_spec'])}")
    else:
        print_train_command(run)


def print_train_command(run: Run) -> None:
    """Print the command that trains a verifier on the labels of a run."""
    if {t.split for t in run.traces.values()} != {"train", "validation"}:
        print("pav.train needs solutions of both splits; label some with validation_problems")
        return
    output, number = run.directory.parent / "pav.ckpt", 2
    while output.exists():
        output, number = output.with_name(f"pav_{number}.ckpt"), number + 1
    # Served as the policy itself is, the trunk that it is by default takes no second engine.
    dtype = policy_config(run.manifest).dtype
    print(
        f"next: pav.train --labels {shlex.quote(f'[{run.directory}]')} --output "
        f"{shlex.quote(str(output))}{task_option(run.manifest['task_spec'])}"
        + (f" --dtype {dtype}" if dtype != "float32" else "")
    )
