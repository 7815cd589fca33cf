"""What label runs lack: shards that are not there, solutions that are still owed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pav.core.manifest import PROMPTS

# What a merged run holds once for all its parts; the rest of a manifest is each part's own.
COMMON = (
    "format", "task_spec", "policy", "task", "tokenizer", "sampler", "policy_fingerprint",
)  # fmt: skip
NAMED = 8


@dataclass(frozen=True)
class Part:
    """A label run, as far as it is.

    Attributes:
        directory: where it lies.
        manifest: what it is.
        solutions: that it is to have; 0 if nobody knows.
        owed: those of them that are known to be missing, or not labelled to the end.
    """

    directory: str
    manifest: Mapping[str, Any]
    solutions: int
    owed: int


def lacking(parts: Iterable[Part]) -> dict[str, Any]:
    """What runs lack that are taken together; empty where nothing is known to be missing.

    A merged run counts as the runs that it was made of. The value is plain data (``partial`` in the
    manifest of a merged run): ``shards`` that no part is, ``solutions`` that parts still owe.
    """
    best: dict[tuple[str, str | None], Part] = {}
    for part in parts:
        for leaf in _leaves(part):
            key = _setting(leaf.manifest), leaf.manifest.get("shard")
            if key not in best or leaf.owed < best[key].owed:
                best[key] = leaf
    present: dict[tuple[str, int], dict[int, Part]] = {}
    for (setting, shard), leaf in best.items():
        if shard is not None:
            i, n = map(int, shard.split("/"))
            present.setdefault((setting, n), {})[i] = leaf
    shards = [
        {"beside": next(iter(found.values())).directory, "missing": missing}
        for (_, n), found in present.items()
        if (missing := [f"{i}/{n}" for i in range(n) if i not in found])
    ]
    solutions = [
        {"directory": p.directory, "done": p.solutions - p.owed, "of": p.solutions}
        for p in best.values()
        if p.owed
    ]
    return {"shards": shards, "solutions": solutions} if shards or solutions else {}


def _leaves(part: Part) -> Iterator[Part]:
    """The runs that a merged run was made of, or the run itself."""
    if "merged" not in part.manifest:
        yield part
        return
    partial = part.manifest.get("partial", {})
    known = {row["directory"]: row for row in partial.get("solutions", ())}
    for manifest in part.manifest["merged"]:
        row = known.get(manifest["directory"], {"of": 0, "done": 0})
        inner = {**manifest, "partial": partial}
        yield from _leaves(Part(manifest["directory"], inner, row["of"], row["of"] - row["done"]))


def _setting(manifest: Mapping[str, Any]) -> str:
    """What the shards of one run have in common."""
    own = (*COMMON, PROMPTS, "directory", "partial", "shard")
    return json.dumps({k: v for k, v in manifest.items() if k not in own}, sort_keys=True)


def said(lack: Mapping[str, Any]) -> str:
    """One line of text about what :func:`lacking` found; empty where it found nothing."""
    parts = []
    for row in lack.get("shards", ()):
        names = _listed(row["missing"], ", ")
        verb = "shard {} is" if len(row["missing"]) == 1 else "shards {} are"
        parts.append(f"{verb.format(names)} missing beside {row['beside']!r}")
    for row in lack.get("solutions", ()):
        parts.append(f"{row['directory']!r} has {row['done']} of {row['of']} solutions")
    return _listed(parts, "; ")


def _listed(names: Sequence[str], separator: str) -> str:
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    return separator.join([*names[:NAMED], *more])
