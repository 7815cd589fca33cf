"""What a comparison found, in a sentence: for the end of a log and the top of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# What a beam is compared with first.
KINDS = {
    "equal tokens": "with as many policy tokens",
    "equal FLOPs": "with as much compute",
    "equal N": "at the same N",
}


def headline(rows: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> str:
    """The first beam at its largest N against the ORM baseline; without a beam, all at theirs.

    Args:
        rows: of ``compare.csv``, as text.
        differences: of ``compare.json``.
    """
    accuracy = {(r["method"], int(r["n"])): float(r["accuracy"]) for r in rows}
    problems = f"{rows[0]['problems']} problems"
    found = _chosen(rows, differences)
    if found is None:
        best = {r["method"]: r for r in sorted(rows, key=lambda r: int(r["n"]))}
        said = [
            f"{name} (N={r['n']}) {_share(r['accuracy'])} [{_share(r['low'])}, {_share(r['high'])}]"
            for name, r in best.items()
        ]
        return f"of {problems} are right: {'; '.join(said)}"
    low, high = found["ci95"]
    a, b = (accuracy[found[x], found[f"{x}_n"]] for x in "ab")
    verdict = (
        f": {problems} do not tell which is better"
        if low <= 0 <= high
        else f": {found['a'] if low > 0 else found['b']} is better"
    )
    return (
        f"{found['a']} (N={found['a_n']}) is right on {_share(a)} of {problems}, {found['b']} "
        f"{KINDS[found['kind']]} (N={found['b_n']}) on {_share(b)}; difference "
        f"{_change(found['difference'])} [{_change(low)}, {_change(high)}]{verdict}"
    )


def _chosen(
    rows: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    against = [d for d in differences if d["kind"] in KINDS]
    if not against:
        return None
    order = list(dict.fromkeys(r["method"] for r in rows))
    orms = [r["method"] for r in rows if json.loads(r["settings"]).get("pick") == "orm"]
    first = min((d["a"] for d in against), key=order.index)
    own = [d for d in against if d["a"] == first]
    widest = [d for d in own if d["a_n"] == max(d["a_n"] for d in own)]
    kinds = list(KINDS)
    return min(
        widest, key=lambda d: (d["b"] not in orms, kinds.index(d["kind"]), order.index(d["b"]))
    )


def _share(value: Any) -> str:
    return f"{float(value):.3f}".removeprefix("0")


def _change(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1)
