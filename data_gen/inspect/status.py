"""``data_gen.status DIR ...``: how far label runs are; reads only, so a writer is not disturbed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any

from rich.table import Table

from data_gen.label_run import Run, read_run, stepper_of
from data_gen.strategies import next_rollouts, plan_of
from pav.cli.directories import run_on_directories
from pav.core.errors import UserError
from pav.core.journal import JOURNAL
from pav.core.printable import cell, one_line
from pav.core.tables import wide_console
from pav.engine.pool import worker_lines
from pav.labels.unfinished import said

RECENT = 600.0


@dataclass(frozen=True)
class StatusConfig:
    """How far label runs are, running or not.

    Args:
        labels: the runs (``data_gen.status A B`` is short for ``--labels '[A, B]'``).
    """

    labels: list[str] = field(default_factory=list)


def status(config: StatusConfig) -> None:
    """Print a row per run, then success rates (see :class:`StatusConfig`)."""
    if not config.labels:
        raise UserError("labels is empty; give the directories to look at")
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for column in ("solutions", "rollouts", "rollouts/s", "tokens/s", "hours", "left", "state"):
        table.add_column(column, justify="right", no_wrap=True)
    right: dict[str, list[int]] = {}
    partly: dict[str, dict[str, Any]] = {}
    for directory in config.labels:
        run = read_run(directory)
        if partial := run.manifest.get("partial"):
            partly[directory] = partial
        table.add_row(*map(cell, _row(run)))
        for kind, records in (("traces", run.traces), ("rollouts", run.completions)):
            for record in records.values():
                tally = right.setdefault(f"{kind} of {record.policy}", [0, 0, 0])
                tally[0] += record.correct
                tally[1] += 1
                tally[2] += record.truncated
    wide_console().print(table)
    for directory, partial in partly.items():
        print(f"{directory} is partial: {said(partial)}")
    for directory in config.labels:
        for line in worker_lines(Path(directory)):
            print(one_line(line))
    for name, (k, n, cut) in sorted(right.items()):
        print(f"{one_line(name)}: {k / n:.3f} of {n} right, {cut / n:.1%} truncated")


def _row(run: Run) -> list[str]:
    plan = plan_of(run.manifest)
    stepper = stepper_of(run) if plan.branches else None
    done = sum(not next_rollouts(plan, t, run.completions, stepper) for t in run.traces.values())
    total = run.solutions or _planned(run.manifest)
    per_second, tokens = rates(run)
    # Rollouts are what takes time; solutions come in bursts.
    left = ""
    if total and per_second and 0 < done < total:
        owed = len(run.completions) * (total - done) / done
        left = f"{owed / per_second / 3600:.1f} h"
    return [
        str(run.directory),
        f"{done}/{total}" if total else str(done),
        str(len(run.completions)),
        f"{per_second:.1f}" if per_second else "-",
        f"{tokens:.0f}" if tokens else "-",
        f"{run.seconds / 3600:.2f}" if run.seconds else "-",
        left or "-",
        _state(run, done, total),
    ]


def _state(run: Run, done: int, total: int | None) -> str:
    if run.manifest.get("partial"):
        return "partial"
    if run.sealed:
        return "finished" if total is None or done >= total else "stopped, sealed"
    age = time() - (run.directory / JOURNAL).stat().st_mtime
    ago = f"{age:.0f} s" if age < 120 else f"{age / 60:.0f} min"
    return f"last rollout {ago} ago"


def rates(run: Run) -> tuple[float, float]:
    """(rollouts, tokens) per second over the last ten minutes of work in the journal.

    Of a sealed run, over all its work, model loading included; 0 where no time was written down.
    """
    recent = [(at, tokens) for at, tokens in run.pace if at >= run.pace[-1][0] - RECENT]
    span = recent[-1][0] - recent[0][0] if recent else 0.0
    if span > 0:
        return len(recent) / span, sum(tokens for _, tokens in recent) / span
    if run.sealed and run.seconds:
        return len(run.completions) / run.seconds, run.generated / run.seconds
    return 0.0, 0.0


def _planned(manifest: dict[str, Any]) -> int | None:
    """Solutions of a run that did not write them down, where its task had problems enough."""
    if manifest.get("n_seeds") is None:
        return None
    return int((manifest["problems"] + manifest["validation_problems"]) * manifest["n_seeds"])


def main() -> None:
    """Entry point of ``data_gen.status``."""
    run_on_directories(status, StatusConfig, "data_gen.status", many=True)


if __name__ == "__main__":
    main()
