"""Sample traces of a run of ``pav.rl``, as text: what ``data_gen.show`` prints of one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from rich.table import Table

from pav.core.errors import UserError
from pav.core.heads import ORM
from pav.core.printable import cell, printable
from pav.core.tables import wide_console
from pav.rl.samples import Sampled, read_samples


def show_samples(directory: Path, wanted: str | None) -> None:
    """Print the sample traces of a problem, from the last iteration that has some.

    Args:
        directory: of a run of ``pav.rl``.
        wanted: number of the problem among those with samples, or its id; None for the last one.

    Raises:
        UserError: if there is no such problem.
    """
    samples = read_samples(directory)
    ids = list(dict.fromkeys(t.problem_id for t in samples))
    if not ids:
        raise UserError(f"labels {str(directory)!r} holds no sample traces yet; wait for pav.rl")
    chosen = samples[-1].problem_id if wanted is None else wanted
    if chosen not in ids and chosen.isdecimal() and int(chosen) < len(ids):
        chosen = ids[int(chosen)]
    own = [t for t in samples if t.problem_id == chosen]
    if not own:
        raise UserError(
            f"problem is {wanted!r}; give a number below {len(ids)} (the run has traces of "
            f"{len(ids)} problems) or an id"
        )
    own = [t for t in own if t.iteration == own[-1].iteration]
    print(printable(f"problem {chosen} (iteration {own[0].iteration}), answer {own[0].gold}"))
    print(printable(own[0].question))
    for index, trace in enumerate(own):
        print(
            printable(
                f"\nversion {trace.version}, {index}: {trace.said}, answer {trace.answer}, outcome "
                f"{trace.outcome:.3g}, dense {sum(trace.gain):+.3f}"
            )
        )
        wide_console().print(_table(trace))


def _table(trace: Sampled) -> Table:
    """A row per step: Q of every head after it, A what it changed, and what it earned."""
    table = Table(box=None, pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("text", overflow="fold")
    for head in trace.q:
        for column in (head,) if head == ORM else (head, "A"):
            table.add_column(cell(column), justify="right", no_wrap=True)
    for column in ("gain", "credit"):
        table.add_column(column, justify="right", no_wrap=True)
    changes = {head: [None, *(b - a for a, b in pairwise(q_P))] for head, q_P in trace.q.items()}
    for p, text in enumerate(["(the problem)", *trace.steps]):
        row = [str(p), text.rstrip("\n")]
        for head, q_P in trace.q.items():
            row.append(f"{q_P[p]:.2f}")
            change = changes[head][p]
            if head != ORM:
                row.append("" if change is None else f"{change:+.2f}")
        row += [
            f"{values[p - 1]:+.2f}" if 0 < p <= len(values) else ""
            for values in (trace.gain, trace.credit)
        ]
        table.add_row(*map(cell, row))
    if trace.tail:
        table.add_row("", cell(f"{trace.tail} (no whole step)"))
    return table
