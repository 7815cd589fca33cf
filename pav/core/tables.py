"""The printed table of results: every command's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from pav.core.printable import cell
from pav.core.statistics import Interval

# What a column of any table of results means; terminal and report say it under the table.
EXPLAINED = {
    "N": "width of a beam, number of solutions of best-of-N; in brackets the beam whose policy "
    "tokens or FLOPs that number matches",
    "N=...": "share of problems whose final pick is right, at that N: the width of a beam, the "
    "number of solutions of best-of-N",
    "accuracy [95%]": "share of problems whose final pick is right, with its interval",
    "95% at the last": "interval of the accuracy at the largest N, over problems",
    "tokens there": "what the policy samples at the largest N, mean per problem",
    "in final set": "share of problems with a right answer among the solutions picked from: what a "
    "perfect pick would reach",
    "policy tokens": "sampled, mean per problem",
    "verifier tokens": "computed by the verifier's own engine, mean per problem",
    "seconds": "of search; nan where an earlier start did a part of it",
    "believed": "the verifier's mean score of what it picked: far above the accuracy, it was gamed",
    "MFLOPs policy + verifier": "forward passes of both, mean per problem",
    "difference": "of the accuracies of this and of what is subtracted, on the same problems, with "
    "its 95% interval",
    "p": "exact McNemar test: the chance of so many wins or losses if both were equally good",
}


def result_row(
    method: str,
    n: str,
    accuracy: Interval,
    oracle: float,
    policy_tokens: float,
    verifier_tokens: float,
    seconds: float,
) -> dict[str, str]:
    """The columns that every table of results has.

    Args:
        method: its name.
        n: width or count, with a remark if need be.
        accuracy: over problems.
        oracle: share of problems with a right answer in the final set.
        policy_tokens: sampled, mean per problem.
        verifier_tokens: computed, mean per problem.
        seconds: as the caller counts them.
    """
    return {
        "method": method,
        "N": n,
        "accuracy [95%]": str(accuracy),
        "in final set": f"{oracle:.3f}",
        "policy tokens": f"{policy_tokens:.0f}",
        "verifier tokens": f"{verifier_tokens:.0f}",
        "seconds": f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.3f}",
    }


def explained(columns: Iterable[str]) -> dict[str, str]:
    """Column -> what it means, for those that need it."""
    named = dict.fromkeys("N=..." if c.startswith("N=") else c for c in columns)
    return {c: EXPLAINED[c] for c in named if c in EXPLAINED}


def print_table(title: str, rows: Sequence[dict[str, str]]) -> None:
    """Print rows that share their columns, and what these mean; nothing where there is none."""
    if not rows:
        return
    table = Table(title=cell(title), title_justify="left")
    for column in rows[0]:
        table.add_column(cell(column))
    for row in rows:
        table.add_row(*map(cell, row.values()))
    console = wide_console(200)
    console.print(table)
    for column, meaning in explained(rows[0]).items():
        console.print(cell(f"  {column}: {meaning}"))
    console.print()


def wide_console(width: int = 1000) -> Console:
    """A console; where output is a file its lines are as long as need be, up to ``width``."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = width
    return console
