"""``python -m benchmarks.summary``: every committed result against its target.

Reads ``benchmarks/results/*.json``; a target that was missed stays in its file and is shown as
MISSED. A result is one row::

    {"metric": "...", "value": 0.66, "ci95": [0.6, 0.7] | null,
     "target": {"op": ">=" | "<=", "value": 0.5} | null,
     "seeds": ..., "n_problems": ..., "command": "...", "machine": "...", "date": "...",
     "commit": "..."}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from pav.cli.run import run
from pav.core.errors import UserError

FIELDS = {
    "metric", "value", "ci95", "target", "seeds", "n_problems", "command", "machine", "date",
    "commit",
}  # fmt: skip
COLUMNS = ["metric", "value", "95% interval", "target", "verdict"]
Verdict = Literal["met", "MISSED", ""]


@dataclass(frozen=True)
class SummaryConfig:
    """All results against their targets.

    Args:
        results: directory of result files (JSON).
    """

    results: str = "benchmarks/results"


@dataclass(frozen=True)
class Result:
    """One row of a result file; what it was measured with stays in the file.

    Attributes:
        metric: what was measured.
        value: the measurement.
        ci95: its 95% interval, or None.
        op: ``>=`` or ``<=``; None where there is no target.
        target: the number that ``op`` compares with.
    """

    metric: str
    value: float
    ci95: tuple[float, float] | None = None
    op: Literal[">=", "<="] | None = None
    target: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """Whether the target is met; a value that is not a number misses it."""
        if self.op is None:
            return ""
        met = self.value >= self.target if self.op == ">=" else self.value <= self.target
        return "met" if met else "MISSED"

    @property
    def cells(self) -> list[str]:
        """The row as text, in the order of ``COLUMNS``."""
        interval = (
            "" if self.ci95 is None else f"{_number(self.ci95[0])} .. {_number(self.ci95[1])}"
        )
        target = "" if self.op is None else f"{self.op} {_number(self.target)}"
        return [self.metric, _number(self.value), interval, target, self.verdict]


def _number(value: float) -> str:
    return f"{value:.4g}"


def read_results(path: Path) -> list[Result]:
    """Rows of one result file.

    Raises:
        UserError: if the file is not a list of rows as the module's docstring describes them.
    """
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"result file {str(path)!r} is not JSON ({error}); rerun its command"
        ) from None
    if not isinstance(rows, list):
        raise UserError(f"result file {str(path)!r} holds no list; write a list of rows")
    return [_result(row, f"{path}, row {i}") for i, row in enumerate(rows)]


def _result(row: Any, where: str) -> Result:
    if not isinstance(row, dict):
        raise UserError(f"{where} is {row!r}; write an object with {', '.join(sorted(FIELDS))}")
    if missing := sorted(FIELDS - row.keys()):
        raise UserError(f"{where} has no {', '.join(missing)}; add it (null where there is none)")
    if not isinstance(row["metric"], str):
        raise UserError(f"{where}: metric is {row['metric']!r}; write a string")
    value = _checked(row["value"], f"{where}: value")
    ci95 = row["ci95"]
    if ci95 is not None:
        if not isinstance(ci95, list) or len(ci95) != 2:
            raise UserError(f"{where}: ci95 is {ci95!r}; write [low, high] or null")
        low, high = (_checked(bound, f"{where}: ci95") for bound in ci95)
        ci95 = (low, high)
    target = row["target"]
    if target is None:
        return Result(row["metric"], value, ci95)
    if not isinstance(target, dict) or target.get("op") not in (">=", "<="):
        raise UserError(f'{where}: target is {target!r}; write {{"op": ">=" or "<=", "value": x}}')
    goal = _checked(target.get("value"), f"{where}: target.value")
    return Result(row["metric"], value, ci95, target["op"], goal)


def _checked(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{what} is {value!r}; write a number")
    return float(value)


def summary(config: SummaryConfig) -> None:
    """Print every result (see :class:`SummaryConfig`).

    Raises:
        UserError: if the directory is missing or a file in it is malformed.
    """
    directory = Path(config.results)
    if not directory.is_dir():
        raise UserError(
            f"no directory {config.results!r}; start in the repository or set --results"
        )
    # All files are read before the first is shown: a malformed one is the whole answer.
    results = {path.stem: read_results(path) for path in sorted(directory.glob("*.json"))}
    console = Console()
    for name, rows in results.items():
        show(name, rows, console)
    verdicts = [row.verdict for rows in results.values() for row in rows]
    print(
        f"{len(verdicts)} results in {len(results)} files: {verdicts.count('met')} targets met, "
        f"{verdicts.count('MISSED')} MISSED, {verdicts.count('')} without a target"
    )


def show(name: str, rows: list[Result], console: Console) -> None:
    """Print one file: a table on a terminal, else one tab-separated line a result."""
    if not console.is_terminal:
        for row in rows:
            print("\t".join([name, *row.cells]))
        return
    table = Table(*COLUMNS, title=name, title_justify="left")
    for row in rows:
        style = {"met": "green", "MISSED": "bold red", "": None}[row.verdict]
        table.add_row(*row.cells, style=style)
    console.print(table)


def main() -> None:
    """Entry point of ``python -m benchmarks.summary``."""
    run(summary, SummaryConfig, "benchmarks.summary")


if __name__ == "__main__":
    main()
