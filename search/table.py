"""The printed table of results: every command's."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from pav.stats import Interval


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


def print_table(title: str, rows: Sequence[dict[str, str]], width: int = 120) -> None:
    """Print rows that share their columns; nothing where there is none."""
    if not rows:
        return
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    Console(width=width).print(table)
