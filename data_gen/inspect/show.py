"""``data_gen.show DIR --problem 17``: the labelled solutions of a problem, as text.

Of a run of ``pav.rl`` the sample traces, with what every step earned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from data_gen.inspect.samples import show_samples
from data_gen.label_run import Run, base_policy, read_run, task_of
from data_gen.likelihood.command import read_likelihood
from pav.cli.directories import run_on_directories
from pav.core.errors import UserError
from pav.core.printable import cell, printable
from pav.core.tables import wide_console
from pav.labels.tables import Trace, count, own_endings, prefix_key
from pav.policy.policy import Policy
from pav.rl.samples import SAMPLES
from pav.tasks.base import Task


@dataclass(frozen=True)
class ShowConfig:
    """Print the labelled solutions of a problem: k/n, Q and A of every step.

    Where there are likelihoods (data_gen.likelihood), also the log-probability of the reference
    answer after every step and the step's progress, which is its change.

    Of a run of pav.rl the sample traces of a problem: Q of every head and its change, the dense
    reward of every step (gain), and what that adds to the weight of the step's tokens (credit).

    Args:
        labels: directory of the run (``data_gen.show DIR`` is short for ``--labels DIR``).
        problem: number of the problem in the run, from 0, or its id; by default the first, or the
            last one that pav.rl sampled.
        task: the run's task, where it is not built in.
    """

    labels: str
    problem: str | None = None
    task: Task | None = None


def show(config: ShowConfig) -> None:
    """Print the traces of a problem (see :class:`ShowConfig`)."""
    if (Path(config.labels) / SAMPLES).is_file():
        show_samples(Path(config.labels), config.problem)
        return
    run = read_run(config.labels)
    policy = base_policy(run, task_of(run, config.task))
    traces = _traces(run, config.problem or "0")
    own = {t.problem_id for t in traces}
    counts = count(
        (c for c in run.completions.values() if c.problem_id in own),
        own_endings(run.manifest, traces),
    )
    likelihoods = read_likelihood(run.directory)
    first = traces[0]
    print(printable(f"problem {first.problem_id} ({first.split}), answer {first.gold}"))
    print(printable(first.question))
    for trace in traces:
        state = "truncated" if trace.truncated else "right" if trace.correct else "wrong"
        print(printable(f"\n{trace.policy} {trace.seed_index}: {state}, answer {trace.answer}"))
        wide_console().print(_table(trace, policy, list(run.policies), counts, likelihoods))


def _traces(run: Run, wanted: str) -> list[Trace]:
    ids = list(dict.fromkeys(t.problem_id for t in run.traces.values()))
    if wanted in ids:
        chosen = wanted
    elif wanted.isdecimal() and int(wanted) < len(ids):
        chosen = ids[int(wanted)]
    else:
        raise UserError(
            f"problem is {wanted!r}; give a number below {len(ids)} (the run has {len(ids)} "
            "problems) or an id"
        )
    return [t for t in run.traces.values() if t.problem_id == chosen]


def _table(
    trace: Trace,
    policy: Policy,
    names: list[str],
    counts: dict[tuple[str, str], tuple[int, int]],
    likelihoods: dict[tuple[str, str], float],
) -> Table:
    """A row per step; Q is the share of right rollouts after it, A what the step changed."""
    table = Table(box=None, pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("text", overflow="fold")
    for name in names:
        for column in (f"{name} k/n", "Q", "A"):
            table.add_column(cell(column), justify="right", no_wrap=True)
    liked = list(dict.fromkeys(name for _, name in likelihoods))
    for name in liked:
        for column in (f"lik/{name}", "progress"):
            table.add_column(cell(column), justify="right", no_wrap=True)
    before: dict[str, float | None] = dict.fromkeys(names)
    likely: dict[str, float | None] = dict.fromkeys(liked)
    ends = [0, *trace.step_ends]
    for step, end in enumerate(ends):
        ids = trace.ids[ends[step - 1] : end] if step else []
        key = prefix_key(trace.problem_id, trace.ids[:end])
        row = [str(step), policy.text(ids).rstrip("\n") if step else "(the problem)"]
        for name in names:
            if end == len(trace.ids) and step and not trace.truncated:
                q: float | None = float(trace.correct)
                shown = "end"
            else:
                k, n = counts.get((key, name), (0, 0))
                q = k / n if n else None
                shown = f"{k}/{n}" if n else "-"
            last = before[name]
            advantage = "" if q is None or last is None else f"{q - last:+.2f}"
            row += [shown, "" if q is None else f"{q:.2f}", advantage]
            before[name] = q
        for name in liked:
            value, last = likelihoods.get((key, name)), likely[name]
            row.append("" if value is None else f"{value:.2f}")
            row.append("" if value is None or last is None else f"{value - last:+.2f}")
            likely[name] = value
        table.add_row(*map(cell, row))
    tail = trace.ids[ends[-1] :]
    if tail:
        table.add_row("", cell(policy.text(tail) + " (no whole step)"))
    return table


def main() -> None:
    """Entry point of ``data_gen.show``."""
    run_on_directories(show, ShowConfig, "data_gen.show")


if __name__ == "__main__":
    main()
