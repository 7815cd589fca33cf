"""Labels on disk: the tables that ``data_gen`` writes and ``pav.train`` reads.

A run directory holds ``manifest.json`` and three folders of Parquet files:

``traces``
    one row per solution: ids, step ends, grade, policy, seed.
``labels``
    one row per (prefix, rollout policy): k right of n rollouts. ``(trace, step) -> prefix`` is
    derivable by :func:`prefix_key`, so identical prefixes are paid for once. Endings of solutions
    (:func:`own_endings`) are not in it: :func:`count` adds them.
``completions``
    one row per rollout, kept beside the counts so that a grader can be mended afterwards.

``data_gen.likelihood`` may add a fourth, ``likelihood``: log-probabilities of the reference answer
after every step. They are no counts and are never mixed with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pav.core.errors import UserError
from pav.core.journal import JOURNAL, journal_lines
from pav.core.manifest import PROMPTS, other_prompt
from pav.labels.files import (
    AGREE,
    LIKELIHOOD,
    PROMPT_IDS,
    checked_manifest,
    read_tables,
    two_askers,
)
from pav.labels.unfinished import Part, lacking, said

_IDS = pa.list_(pa.int32())
TRACES = pa.schema(
    [
        ("trace_id", pa.string()),
        ("problem_id", pa.string()),
        ("question", pa.string()),
        ("gold", pa.string()),
        ("split", pa.string()),
        ("policy", pa.string()),
        ("seed_index", pa.int32()),
        ("ids", _IDS),
        ("step_ends", _IDS),
        ("answer", pa.string()),
        ("correct", pa.bool_()),
        ("truncated", pa.bool_()),
    ]
)
LABELS = pa.schema(
    [
        ("prefix_key", pa.string()),
        ("problem_id", pa.string()),
        ("policy", pa.string()),
        ("policy_fingerprint", pa.string()),
        ("first_index", pa.int32()),
        ("n", pa.int32()),
        ("k", pa.int32()),
        ("truncated", pa.int32()),
        ("tokens", pa.int64()),
    ]
)
COMPLETIONS = pa.schema(
    [
        ("prefix_key", pa.string()),
        ("problem_id", pa.string()),
        ("policy", pa.string()),
        ("index", pa.int32()),
        ("prefix_ids", _IDS),
        ("ids", _IDS),
        ("answer", pa.string()),
        ("correct", pa.bool_()),
        ("truncated", pa.bool_()),
    ]
)

_TABLES = (("traces", "trace", TRACES), ("completions", "completion", COMPLETIONS))
Key = tuple[str, str, int]
# Folder of the table of likelihoods.
LIKELIHOODS = "likelihood"


def prefix_key(problem_id: str, ids: Sequence[int]) -> str:
    """Key of a solution prefix (32 hex digits): a hash of the problem and the solution ids."""
    digest = hashlib.blake2b(problem_id.encode() + b"\0", digest_size=16)
    digest.update(np.asarray(ids, dtype="<i4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Trace:
    """A graded solution (see :data:`TRACES`). ``ids`` excludes the prompt."""

    trace_id: str
    problem_id: str
    question: str
    gold: str | None
    split: str
    policy: str
    seed_index: int
    ids: list[int]
    step_ends: list[int]
    answer: str | None
    correct: bool
    truncated: bool


@dataclass(frozen=True)
class Completion:
    """A graded rollout from a prefix (see :data:`COMPLETIONS`)."""

    prefix_key: str
    problem_id: str
    policy: str
    index: int
    prefix_ids: list[int]
    ids: list[int]
    answer: str | None
    correct: bool
    truncated: bool


def prefixes(trace: Trace) -> list[list[int]]:
    """Solution ids of every prefix to go on from: step 0 and every step but the one that ends."""
    ends = trace.step_ends if trace.truncated else trace.step_ends[:-1]
    return [[], *(trace.ids[:end] for end in ends)]


def own_endings(manifest: Mapping[str, Any], traces: Iterable[Trace]) -> list[Trace]:
    """The solutions of a run whose endings count as rollouts from their own prefixes.

    A solution that a rollout policy wrote went on from each of its prefixes as a rollout does: its
    ending is one more sample of the same distribution, and costs nothing. It is left out where
    rollouts end at a place that depends on it (``first_pit``), and under ``all_prefixes``, whose
    n is ``n_mc``. Endings of one solution are one event: they tell less than as many rollouts.
    """
    parts = (manifest, *manifest.get("merged", ()))
    if not any(part.get("strategy") == "adaptive" for part in parts):
        return []
    return [trace for trace in traces if trace.policy in manifest["rollout_policies"]]


def count(
    completions: Iterable[Completion], endings: Iterable[Trace]
) -> dict[tuple[str, str], tuple[int, int]]:
    """(prefix key, policy name) -> (k, n): k of n rollouts are right.

    Args:
        completions: the rollouts.
        endings: see :func:`own_endings`.
    """
    found: dict[tuple[str, str], tuple[int, int]] = {}

    def add(key: str, policy: str, correct: bool) -> None:
        k, n = found.get((key, policy), (0, 0))
        found[key, policy] = k + correct, n + 1

    for completion in completions:
        add(completion.prefix_key, completion.policy, completion.correct)
    for trace in endings:
        for prefix in prefixes(trace):
            add(prefix_key(trace.problem_id, prefix), trace.policy, trace.correct)
    return found


@dataclass(frozen=True)
class Rows:
    """What a label run holds by now.

    Attributes:
        traces: solutions by trace id.
        completions: rollouts by (prefix key, policy, index).
        journal: what is not in the tables yet, and when it was written (:mod:`pav.core.journal`).
        sealed: whether all of it is in the tables.
        solutions: solutions that it is to have; None if it was not written down.
        owed: those that were not finished when it was sealed; None if it was not written down.
    """

    traces: dict[str, Trace]
    completions: dict[Key, Completion]
    journal: list[dict[str, Any]]
    sealed: bool
    solutions: int | None
    owed: int | None


def read_rows(directory: Path) -> Rows:
    """Read a label run, what its journal holds included. It may be written to meanwhile."""
    path = directory / JOURNAL
    # Journal before tables: what is sealed in between is then in both, never in neither.
    journal = [e for _, e in journal_lines(path) if e is not None] if path.exists() else []
    traces: dict[str, Trace] = {}
    completions: dict[Key, Completion] = {}
    for kind, record in sealed(directory):
        remember(kind, record, traces, completions)
    run: dict[str, Any] = {}
    for entry in journal:
        run = entry["record"] if entry["kind"] == "run" else run
        remember(entry["kind"], entry["record"], traces, completions)
    is_sealed = (directory / "traces").exists() and all(e["kind"] == "run" for e in journal)
    owed = run.get("owed") if is_sealed else None
    return Rows(traces, completions, journal, is_sealed, run.get("solutions"), owed)


def sealed(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, record) of everything in the sealed tables."""
    for folder, kind, schema in _TABLES:
        for row in read_tables(directory / folder, schema):
            yield kind, row


def remember(
    kind: str,
    record: dict[str, Any],
    traces: dict[str, Trace],
    completions: dict[Key, Completion],
) -> None:
    """Put a record as it was read in its place (see :func:`place`); other kinds are left out."""
    if kind == "trace":
        place(Trace(**record), traces, completions)
    elif kind == "completion":
        place(Completion(**record), traces, completions)


def place(
    record: Trace | Completion,
    traces: dict[str, Trace],
    completions: dict[Key, Completion],
) -> None:
    """Put a record in its place; a later one of the same key replaces an earlier one."""
    if isinstance(record, Trace):
        traces[record.trace_id] = record
    else:
        completions[record.prefix_key, record.policy, record.index] = record


@dataclass(frozen=True)
class LabelSet:
    """Everything one or more label runs hold.

    Attributes:
        manifest: the manifest of the first run; the others agree with it where it matters.
        traces: solutions.
        counts: see :func:`count`.
        completions: rollouts.
        likelihoods: (prefix key, policy name) -> log-probability of the task's forced answer.
        warnings: a line each of what the user should know of the runs: not sealed, not complete.
        sealed: whether all of it came from tables; a journal may be longer a moment later.
    """

    manifest: dict[str, Any]
    traces: list[Trace]
    counts: dict[tuple[str, str], tuple[int, int]]
    completions: list[Completion]
    likelihoods: dict[tuple[str, str], float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    sealed: bool = True

    @property
    def policies(self) -> list[str]:
        """Names of the rollout policies that labelled prefixes."""
        return sorted({policy for _, policy in self.counts})

    @property
    def likelihood_policies(self) -> list[str]:
        """Names of the policies whose likelihoods were read."""
        return sorted({policy for _, policy in self.likelihoods})

    @property
    def graded(self) -> bool:
        """Whether solutions are graded: there are rollouts, or an answer was read in a solution.

        Under ``grader: none`` there is neither; a weak policy may have rollouts without an answer.
        """
        return bool(self.counts) or any(t.answer is not None or t.correct for t in self.traces)


def read_labels(directories: Sequence[str]) -> LabelSet:
    """Read label runs; counts of the same prefix, policy and rollout are never added twice.

    What is in a journal and not sealed yet is read, too, and said (``warnings``).

    Raises:
        UserError: if a directory holds no labels, or runs disagree on task, tokenizer,
            sampler or policy, or on what a rollout policy's name stands for.
    """
    if not directories:
        raise UserError("labels is empty; give at least one directory that data_gen.rollouts wrote")
    manifests: dict[str, dict[str, Any]] = {}
    traces: dict[str, Trace] = {}
    completions: dict[Key, Completion] = {}
    endings: dict[str, Trace] = {}
    parts: list[Part] = []
    warnings: list[str] = []
    all_sealed = True
    likelihoods: dict[tuple[str, str], float] = {}
    askers: dict[str, dict[str, Any]] = {}
    for directory in map(Path, directories):
        path = directory / "manifest.json"
        if not path.exists():
            raise UserError(
                f"labels {str(directory)!r} has no manifest.json; run data_gen.rollouts "
                f"--output {directory} first"
            )
        manifests[str(directory)] = checked_manifest(path)
        check_agreement(manifests)
        rows = read_rows(directory)
        parts.append(_part(directory, manifests[str(directory)], rows))
        all_sealed = all_sealed and rows.sealed
        if not rows.sealed:
            warnings.append(_unsealed(directory, rows))
        traces |= rows.traces
        own = own_endings(manifests[str(directory)], rows.traces.values())
        endings |= {t.trace_id: t for t in own}
        completions |= rows.completions
        for row in likelihood_rows(directory):
            name = row["policy"]
            known = askers.get(name, row)
            if differ := two_askers(known, row):
                raise UserError(
                    f"labels {list(directories)} hold likelihoods of two policies called {name!r} "
                    f"({differ}); leave one of the runs out"
                )
            askers[name] = known if known.get("prompt_ids") else row
            likelihoods[row["prefix_key"], name] = row["logprob"]
    if not traces:
        raise UserError(f"labels {list(directories)} hold no traces; let data_gen.rollouts finish")
    counts = count(completions.values(), endings.values())
    manifest = next(iter(manifests.values()))
    if lack := said(lacking(parts)):
        warnings.append(f"labels are not complete: {lack}")
    return LabelSet(
        manifest, list(traces.values()), counts, list(completions.values()), likelihoods, warnings,
        all_sealed,
    )  # fmt: skip


def _part(directory: Path, manifest: dict[str, Any], rows: Rows) -> Part:
    """What the files of a run tell of how far it is, without the rules of its strategy."""
    solutions = max(rows.solutions or 0, len(rows.traces))
    owed = solutions - len(rows.traces) if rows.owed is None else rows.owed
    return Part(str(directory), manifest, solutions, owed)


def _unsealed(directory: Path, rows: Rows) -> str:
    kinds = [entry["kind"] for entry in rows.journal]
    return (
        f"labels {str(directory)!r} are not sealed: {kinds.count('trace')} solutions and "
        f"{kinds.count('completion')} rollouts are read from their journal; the command that makes "
        "them goes on and seals them"
    )


def likelihood_rows(directory: Path) -> list[dict[str, Any]]:
    """Rows of the table of likelihoods of a label run; none without a table."""
    return read_tables(directory / LIKELIHOODS, LIKELIHOOD, [PROMPT_IDS])


def check_agreement(manifests: dict[str, dict[str, Any]]) -> None:
    """Refuse to mix label runs (directory -> manifest) of two settings.

    Raises:
        UserError: if the last disagrees with the first on a key of :data:`AGREE`, calls a
            rollout policy by the name of another one, or asked one with another prompt.
    """
    (first, wanted), *_, (last, found) = [*manifests.items()] * 2
    for key in AGREE:
        if found[key] != wanted[key]:
            raise UserError(
                f"labels {last!r} and {first!r} disagree on {key}: "
                f"{found[key]!r} and {wanted[key]!r}; train on runs of one setting"
            )
    for name, fingerprint in found.get("rollout_policies", {}).items():
        for other, manifest in manifests.items():
            known = manifest.get("rollout_policies", {}).get(name, fingerprint)
            if known != fingerprint:
                raise UserError(
                    f"labels {last!r} and {other!r} call two rollout policies {name!r}: "
                    f"fingerprints {fingerprint} and {known}; make one of them again with another "
                    "prover.name, or leave it out"
                )
    for other, manifest in manifests.items():
        if differ := other_prompt(manifest.get(PROMPTS, {}), found.get(PROMPTS, {})):
            raise UserError(
                f"labels {other!r} and {last!r} were made with two prompts by the same settings: "
                f"{differ}; leave one of them out"
            )
