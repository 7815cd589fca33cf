"""The points of a comparison: one method at one N, their tables and paired differences."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pav.tasks.base import Split
from search.stats import Interval, bootstrap


@dataclass(frozen=True)
class Point:
    """One method at one N.

    Attributes:
        method: its name.
        n: width or sample count.
        matched: the beam width whose tokens this sample count matches; None where ``n`` was asked.
        correct_PS: (problems, seeds) right or wrong.
        oracle_PS: whether the final set holds a right answer.
        policy_tokens, verifier_tokens, verifier_cached: means per problem.
        seconds: per problem; NaN where it was measured by an earlier start.
        settings: of the first record.
    """

    method: str
    n: int
    matched: int | None
    correct_PS: NDArray[np.float64]
    oracle_PS: NDArray[np.float64]
    policy_tokens: float
    verifier_tokens: float
    verifier_cached: float
    seconds: float
    settings: dict[str, Any]

    @property
    def is_beam(self) -> bool:
        """Whether it is a search and not a sample set."""
        return "samples" in self.settings

    @property
    def accuracy(self) -> Interval:
        """Accuracy with its 95% interval over problems."""
        return bootstrap(self.correct_PS)


def write_csv(points: list[Point], path: Path) -> None:
    """One tidy row per point."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            [
                "method",
                "n",
                "matched_to_beam_n",
                "accuracy",
                "low",
                "high",
                "oracle",
                "policy_tokens",
                "verifier_tokens",
                "verifier_cached",
                "seconds",
                "problems",
                "seeds",
                "settings",
            ]
        )
        for p in points:
            a = p.accuracy
            writer.writerow(
                [
                    p.method,
                    p.n,
                    p.matched or "",
                    f"{a.mean:.4f}",
                    f"{a.low:.4f}",
                    f"{a.high:.4f}",
                    f"{p.oracle_PS.mean():.4f}",
                    f"{p.policy_tokens:.1f}",
                    f"{p.verifier_tokens:.1f}",
                    f"{p.verifier_cached:.1f}",
                    f"{p.seconds:.4f}",
                    *p.correct_PS.shape,
                    json.dumps(p.settings),
                ]
            )


def paired(points: list[Point]) -> list[dict[str, Any]]:
    """Paired differences: beam against best-of-N at its tokens, and each method's own doubling."""
    out: list[dict[str, Any]] = []

    def add(kind: str, a: Point, b: Point) -> None:
        d = bootstrap(a.correct_PS - b.correct_PS)
        out.append(
            {
                "kind": kind,
                "a": a.method,
                "a_n": a.n,
                "b": b.method,
                "b_n": b.n,
                "difference": d.mean,
                "ci95": [d.low, d.high],
            }
        )

    beams = [p for p in points if p.is_beam]
    for a in beams:
        for b in points:
            if not b.is_beam and b.matched == a.n:
                add("equal tokens", a, b)
            if b.method == a.method and b.n == 2 * a.n:
                add("doubling", b, a)
    return out


def oracle_line(points: list[Point]) -> list[tuple[float, Interval]]:
    """(policy tokens, share of problems with a right answer among the base policy's samples)."""
    sampled = [p for p in points if not p.is_beam]
    if not sampled:
        return []
    name = sampled[0].method
    return [(p.policy_tokens, bootstrap(p.oracle_PS)) for p in sampled if p.method == name]


def print_points(points: list[Point], differences: list[dict[str, Any]], split: Split) -> None:
    """Two tables: all points, and the paired differences."""
    console = Console(width=130)
    count, seeds = points[0].correct_PS.shape
    table = Table(title=f"{count} {split} problems, {seeds} seed(s); tokens per problem")
    for column in (
        "method",
        "N",
        "accuracy [95%]",
        "in final set",
        "policy tokens",
        "verifier tokens",
        "seconds",
    ):
        table.add_column(column)
    for p in points:
        n = f"{p.n} (tokens of beam {p.matched})" if p.matched else str(p.n)
        table.add_row(
            p.method,
            n,
            str(p.accuracy),
            f"{p.oracle_PS.mean():.3f}",
            f"{p.policy_tokens:.0f}",
            f"{p.verifier_tokens:.0f}",
            f"{p.seconds:.3f}",
        )
    console.print(table)
    table = Table(title="paired differences [95%]")
    for column in ("", "this", "minus", "difference"):
        table.add_column(column)
    for d in differences:
        interval = Interval(d["difference"], *d["ci95"])
        table.add_row(d["kind"], f"{d['a']} N={d['a_n']}", f"{d['b']} N={d['b_n']}", str(interval))
    console.print(table)
