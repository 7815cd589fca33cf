"""The points of a comparison: one method at one N, their tables and paired differences."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pav.core.files import json_text
from pav.core.heads import ORM
from pav.core.printable import csv_text
from pav.core.statistics import Interval, bootstrap, mcnemar
from pav.core.tables import print_table, result_row
from pav.policy.cost import shape_of
from pav.policy.policy import Policy
from pav.tasks.base import Split
from pav.verifier.pick import ORM_RULES
from pav.verifier.scoring import Scorer
from search.run.flops import record_flops
from search.run.records import Record

if TYPE_CHECKING:
    from pav.reward_models.reward_model import RewardModel

# What every point picked, in a comparison's directory.
PICKS = "picks.json"


@dataclass(frozen=True)
class MethodResult:
    """One method at one N.

    Attributes:
        method: its name.
        n: width or sample count.
        matched: the beam width whose policy tokens this sample count matches; None for none.
        matched_flops: the beam width whose total FLOPs it matches; None for none.
        correct_PS: (problems, seeds) right or wrong.
        oracle_PS: whether the final set holds a right answer.
        believed_PS: what the verifier says of the final pick, 0 where nothing was picked; NaN
            without a verifier.
        policy_tokens, policy_prefilled, policy_cached, verifier_tokens, verifier_cached: means per
            problem.
        policy_flops, verifier_flops: means per problem; NaN where an earlier version searched.
        seconds: per problem; NaN where it was measured by an earlier start.
        settings: of the first record.
        base: whether the base policy was sampled (else another one, shown beside it).
        matching: whether nobody asked for this N: it is there to match what a beam spent.
        picked_PS: index of the pick among the final set, -1 where nothing was picked.
        files: file of records of every seed.
    """

    method: str
    n: int
    matched: int | None
    matched_flops: int | None
    correct_PS: NDArray[np.float64]
    oracle_PS: NDArray[np.float64]
    believed_PS: NDArray[np.float64]
    policy_tokens: float
    policy_prefilled: float
    policy_cached: float
    verifier_tokens: float
    verifier_cached: float
    policy_flops: float
    verifier_flops: float
    seconds: float
    settings: dict[str, Any]
    base: bool = True
    matching: bool = False
    picked_PS: NDArray[np.int64] | None = None
    files: tuple[str, ...] = ()

    @property
    def is_beam(self) -> bool:
        """Whether it is a search and not a sample set."""
        return "samples" in self.settings

    @cached_property
    def accuracy(self) -> Interval:
        """Accuracy with its 95% interval over problems."""
        return bootstrap(self.correct_PS)

    @property
    def traces(self) -> int:
        """N as the paper counts it when it compares compute: a beam pays for C children."""
        return int(self.settings.get("places", self.n)) * int(self.settings.get("samples", 1))

    @property
    def flops(self) -> float:
        """Forward FLOPs per problem of policy and verifier."""
        return self.policy_flops + self.verifier_flops


def make_result(
    method: str,
    n: int,
    by_seed: Sequence[Sequence[Record]],
    seconds: float,
    policy: Policy,
    scorer: Scorer | RewardModel | None,
    files: Sequence[Path],
) -> MethodResult:
    """The point of one method at one N from its records, a list (and a file) per seed."""
    flat = [r for records in by_seed for r in records]
    trunk = None if scorer is None else scorer.shape
    # Those of the heads, and the reference row.
    rows = len(scorer.verifier.card.heads) + 1 if isinstance(scorer, Scorer) else 0
    flops = np.array([record_flops(r, shape_of(policy.path), trunk, rows) for r in flat])

    def table(value: Any) -> np.ndarray:
        return np.array([[value(r) for r in records] for records in by_seed], dtype=float).T

    def mean(name: str) -> float:
        return float(np.mean([getattr(r, name) for r in flat]))

    base_head = "" if scorer is None else scorer.base_head
    return MethodResult(
        method=method,
        n=n,
        matched=None,
        matched_flops=None,
        correct_PS=table(lambda r: r.correct),
        oracle_PS=table(lambda r: any(c.correct for c in r.candidates)),
        believed_PS=table(lambda r: verifier_score(r, base_head)),
        policy_tokens=mean("policy_tokens"),
        policy_prefilled=mean("policy_prefilled"),
        policy_cached=mean("policy_cached"),
        verifier_tokens=mean("verifier_tokens"),
        verifier_cached=mean("verifier_cached"),
        policy_flops=float(flops[:, 0].mean()),
        verifier_flops=float(flops[:, 1].mean()),
        seconds=seconds / len(flat),
        settings=flat[0].settings,
        picked_PS=table(lambda r: -1 if r.picked is None else r.picked).astype(np.int64),
        files=tuple(f.name for f in files),
    )


def verifier_score(record: Record, base_head: str) -> float:
    """The verifier's chance that the picked solution is right: its value after the last step.

    0 where nothing could be picked, as accuracy counts it; NaN where no verifier took part.
    """
    rule = record.settings.get("pick")
    head = ORM if rule in ORM_RULES else base_head
    if rule == "majority" or not head:
        return math.nan
    if record.picked is None:
        return 0.0
    values = record.candidates[record.picked].q.get(head)
    return values[-1] if values else math.nan


def write_csv(results: Sequence[MethodResult], path: Path) -> None:
    """One tidy row per point; costs are means per problem, ``believed`` the mean verifier score."""
    with path.open("w", newline="") as stream:
        rows = [{**row, "method": csv_text(row["method"])} for row in csv_rows(results)]
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _row(p: MethodResult) -> dict[str, Any]:
    a = p.accuracy
    count, seeds = p.correct_PS.shape
    return {
        "method": p.method,
        "n": p.n,
        "matched_to_beam_n": p.matched or "",
        "accuracy": f"{a.mean:.4f}",
        "low": f"{a.low:.4f}",
        "high": f"{a.high:.4f}",
        "oracle": f"{p.oracle_PS.mean():.4f}",
        "policy_tokens": f"{p.policy_tokens:.1f}",
        "verifier_tokens": f"{p.verifier_tokens:.1f}",
        "verifier_cached": f"{p.verifier_cached:.1f}",
        "seconds": f"{p.seconds:.4f}",
        "problems": count,
        "seeds": seeds,
        "settings": json_text(p.settings, None),
        "believed": f"{p.believed_PS.mean():.4f}",
        "policy_prefilled": f"{p.policy_prefilled:.1f}",
        "policy_cached": f"{p.policy_cached:.1f}",
        "policy_flops": f"{p.policy_flops:.4g}",
        "verifier_flops": f"{p.verifier_flops:.4g}",
        "total_flops": f"{p.flops:.4g}",
        "flops_matched_to_beam_n": p.matched_flops or "",
    }


def write_picks(
    results: Sequence[MethodResult], problem_ids: Sequence[str], seeds: Sequence[int], path: Path
) -> None:
    """What every point picked, for a reader of its records: they hold the pick of one rule alone.

    JSON: ``problems`` and ``seeds`` in order, and ``points`` with ``method``, ``n``, ``pick`` (the
    rule) and, a list item per seed, ``files`` of records and ``picked``: per problem the index
    among its first ``n`` candidates, -1 for none.
    """
    picked = [
        {
            "method": p.method,
            "n": p.n,
            "pick": p.settings.get("pick"),
            "files": p.files,
            "picked": p.picked_PS.T.tolist(),
        }
        for p in results
        if p.picked_PS is not None
    ]
    plain = {"problems": list(problem_ids), "seeds": list(seeds), "points": picked}
    path.write_text(json_text(plain, None))


def paired(results: Sequence[MethodResult]) -> list[dict[str, Any]]:
    """Paired differences, each with its 95% interval and exact McNemar p.

    A beam against best-of-N at its policy tokens, at its total FLOPs and, as the paper's figures
    do, at its N; and each method's own doubling.
    """
    out: list[dict[str, Any]] = []

    def add(kind: str, a: MethodResult, b: MethodResult) -> None:
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
                "mcnemar_p": mcnemar(a.correct_PS, b.correct_PS),
            }
        )

    beams = [p for p in results if p.is_beam]
    orm = baseline(results)
    for a in beams:
        for b in results:
            if not b.is_beam and b.matched == a.n:
                add("equal tokens", a, b)
            if not b.is_beam and b.matched_flops == a.n:
                add("equal FLOPs", a, b)
            if b.method == orm and b.n == a.n:
                add("equal N", a, b)
            if b.method == a.method and b.n == 2 * a.n:
                add("doubling", b, a)
    return out


def baseline(results: Sequence[MethodResult]) -> str | None:
    """The ORM baseline: the first best-of-N method whose pick is the ORM's argmax."""
    found = (p.method for p in results if not p.is_beam and p.settings.get("pick") == "orm")
    return next(found, None)


def oracle_results(results: Sequence[MethodResult]) -> list[MethodResult]:
    """The points of one method that ranks the base policy's samples: they hold pass@N."""
    sampled = [p for p in results if not p.is_beam and p.base]
    return [p for p in sampled if p.method == sampled[0].method]


def counted(results: Sequence[MethodResult], split: Split) -> str:
    """How many problems and seeds."""
    count, seeds = results[0].correct_PS.shape
    return f"{count} {split} problems, {seeds} seed{'' if seeds == 1 else 's'}"


def print_results(
    results: list[MethodResult], differences: list[dict[str, Any]], split: Split, verbose: bool
) -> None:
    """Two tables: all points and the paired differences, or what matters of both.

    Args:
        results: of the comparison.
        differences: of :func:`paired`.
        split: whose problems.
        verbose: all rows and columns.
    """
    title = counted(results, split)
    rows = [shown_row(row) for row in csv_rows(results)] if verbose else short_rows(results)
    print_table(f"{title}; costs per problem" if verbose else f"accuracy, {title}", rows)
    if not verbose:
        widest = {d["a"]: d["a_n"] for d in sorted(differences, key=lambda d: d["a_n"])}
        differences = [
            d for d in differences if d["kind"] == "equal tokens" and d["a_n"] == widest[d["a"]]
        ]
    what = "paired differences" if verbose else "paired differences at equal policy tokens"
    print_table(what, difference_rows(differences))


def csv_rows(results: Sequence[MethodResult]) -> list[dict[str, Any]]:
    """The rows of ``compare.csv``."""
    return [_row(p) for p in results]


def short_rows(results: Sequence[MethodResult]) -> list[dict[str, str]]:
    """A row per method: its accuracy at every N that was asked for."""
    asked = [p for p in results if not p.matching]
    ns = sorted({p.n for p in asked})
    rows = []
    for method in dict.fromkeys(p.method for p in asked):
        own = {p.n: p for p in asked if p.method == method}
        last = own[max(own)]
        rows.append(
            {"method": method}
            | {f"N={n}": f"{own[n].accuracy.mean:.3f}" if n in own else "" for n in ns}
            | {
                "95% at the last": f"[{last.accuracy.low:.3f}, {last.accuracy.high:.3f}]",
                "tokens there": f"{last.policy_tokens:.0f}",
            }
        )
    return rows


def shown_row(row: dict[str, Any]) -> dict[str, str]:
    """A row of ``compare.csv`` as a table shows it."""
    matches = [
        f"{what} of beam {row[key]}"
        for what, key in (("tokens", "matched_to_beam_n"), ("FLOPs", "flops_matched_to_beam_n"))
        if row.get(key)
    ]
    accuracy = Interval(float(row["accuracy"]), float(row["low"]), float(row["high"]))
    # Columns that came later than the first files.
    verifier_score, policy, verifier = (
        float(row.get(key) or "nan") for key in ("believed", "policy_flops", "verifier_flops")
    )
    return result_row(
        row["method"],
        f"{row['n']} ({', '.join(matches)})" if matches else str(row["n"]),
        accuracy,
        float(row["oracle"]),
        float(row["policy_tokens"]),
        float(row["verifier_tokens"]),
        float(row["seconds"]),
    ) | {
        "believed": f"{verifier_score:.3f}",
        "MFLOPs policy + verifier": f"{policy / 1e6:.0f} + {verifier / 1e6:.0f}",
    }


def difference_rows(differences: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Paired differences as a table shows them."""
    return [
        {
            "at": d["kind"],
            "this": f"{d['a']} N={d['a_n']}",
            "minus": f"{d['b']} N={d['b_n']}",
            "difference": str(Interval(d["difference"], *d["ci95"])),
            "p": f"{d['mcnemar_p']:.2g}",
        }
        for d in differences
    ]
