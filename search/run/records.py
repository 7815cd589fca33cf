"""What a search leaves behind: one JSON line per problem, written as problems finish."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from pav.core.errors import FULL, UserError, unwritable
from pav.core.files import json_text, read_object, replace_file
from pav.core.lock import LOCK, Lock
from pav.core.manifest import other_configuration
from pav.core.signals import interruptible
from pav.verifier.pick import Candidate

MANIFEST = "manifest.json"
# The last key of a line and its value, damaged ones too: no other key and value are so long.
_CRC = re.compile(rb',"([^"]{3})":"([^"]{8})"}\n\Z')


@dataclass(frozen=True)
class Node:
    """What a search tree's viewer needs to know of a scored child, beside its entry in ``steps``.

    Attributes:
        places: where it stood in the next round, which its children name as their parent; empty if
            it was pruned.
        finished: complete.
        q: Q of every head after its step.
    """

    places: list[int]
    finished: bool
    q: dict[str, float]


@dataclass(frozen=True)
class Record:
    """The search of one problem.

    Attributes:
        problem_id, question, gold: the problem.
        method, n, seed: what searched.
        settings: alpha, samples, prover, pick, scoring mode, surprise, sampler.
        answer: the final pick's answer; None where nothing finished.
        correct: whether it is right.
        picked: its index among ``candidates``.
        candidates: the final set.
        truncated: candidates cut by the cap, wherever they were.
        merged: duplicates that were merged.
        policy_tokens .. verifier_logits: what it cost (:class:`pav.policy.cost.Cost`).
        steps: one list per round of [parent, kept, score, text] for every scored child.
        nodes: one list per round, beside ``steps``.
        error: why the problem failed; counts as wrong.
        ungraded: candidates for which the grader failed; they count as wrong.
    """

    problem_id: str
    question: str
    gold: str | None
    method: str
    n: int
    seed: int
    settings: dict[str, Any]
    answer: str | None = None
    correct: bool = False
    picked: int | None = None
    candidates: list[Candidate] = field(default_factory=list)
    truncated: int = 0
    merged: int = 0
    policy_tokens: int = 0
    policy_requests: int = 0
    policy_prefilled: int = 0
    policy_cached: int = 0
    policy_context: int = 0
    verifier_tokens: int = 0
    verifier_cached: int = 0
    verifier_context: int = 0
    verifier_logits: int = 0
    steps: list[list[tuple[int, bool, float, str]]] = field(default_factory=list)
    nodes: list[list[Node]] = field(default_factory=list)
    error: str | None = None
    ungraded: int = 0


def line_of(record: Record) -> bytes:
    """A record as a line of JSON; its last key, ``crc``, is the CRC-32 of the line without it."""
    plain = asdict(record)
    for candidate in plain["candidates"]:
        # JSON has no infinity.
        candidate["score"] = None if candidate["score"] == -math.inf else candidate["score"]
    body = json.dumps(plain, separators=(",", ":"), allow_nan=False).encode()
    return b'%b,"%b":"%b"}\n' % (body[:-1], *_checksum(body))


def _checksum(body: bytes) -> tuple[bytes, bytes]:
    """The key and the value that follow a record."""
    return b"crc", b"%08x" % crc32(body)


def append(path: Path, record: Record) -> None:
    """Add one line, which survives the death of this process."""
    line = line_of(record)
    with path.open("ab", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[stream.write(rest) :]
        except BaseException:
            # Half a line would swallow the next one.
            with suppress(OSError):
                stream.truncate(size)
            raise


def flush(path: Path) -> None:
    """Have the disk keep what was appended, whatever happens to the machine."""
    if path.exists():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def rewrite(path: Path, records: list[Record]) -> None:
    """Replace a file by these records, at once."""
    replace_file(path, b"".join(map(line_of, records)))


def read(path: Path) -> list[Record]:
    """All whole lines of a file; others are cut out, to be searched again.

    A torn last line is what the death of a process leaves; other damage is said.

    Raises:
        UserError: if a line holds something else.
    """
    if not path.exists():
        return []
    records, good = _whole(path)
    content = path.read_bytes()
    if sum(map(len, good)) < len(content):
        if not content.startswith(b"".join(good)):
            lost = content.count(b"\n") - len(good)
            print(
                f"WARNING: {lost} lines of {path} are damaged; what they held is searched again",
                file=sys.stderr,
            )
        replace_file(path, b"".join(good))
    return records


def peek(path: Path) -> list[Record]:
    """All whole lines of a file that another process may be writing."""
    return _whole(path)[0]


def _whole(path: Path) -> tuple[list[Record], list[bytes]]:
    """Records and their lines."""
    records, good = [], []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        body = _CRC.sub(b"}", line)
        try:
            plain = json.loads(body)
        except (ValueError, RecursionError):
            continue
        # Earlier versions wrote none.
        kept = _CRC.search(line)
        if not line.endswith(b"\n") or (kept and kept.groups() != _checksum(body)):
            continue
        try:
            records.append(_record(plain))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise UserError(
                f"{str(path)!r}, line {number}, is no record of a search ({type(error).__name__}: "
                f"{error}); remove the line, or name the output of a search command"
            ) from error
        good.append(line)
    return records, good


def _record(plain: dict[str, Any]) -> Record:
    candidates = []
    for c in plain.pop("candidates"):
        # Earlier versions wrote an infinity.
        score = -math.inf if c["score"] is None else c["score"]
        candidates.append(Candidate(**c | {"score": score}))
    steps = [[tuple(step) for step in children] for children in plain.pop("steps")]
    nodes = [[Node(**node) for node in children] for children in plain.pop("nodes", [])]
    return Record(**plain, candidates=candidates, steps=steps, nodes=nodes)


def write_seconds(path: Path, records: int, seconds: float) -> None:
    """Keep the wall-clock seconds behind a file of records beside it: not in the records, which
    are the same at every repeat.
    """
    kept = {"records": records, "seconds": seconds}
    with suppress(OSError):  # unknown seconds are no reason to end a run
        path.with_suffix(".seconds.json").write_text(json_text(kept, None))


def read_seconds(path: Path, records: int) -> float:
    """Seconds behind a file of so many records; NaN where they are not known."""
    if not records:
        return 0.0
    try:
        kept = json.loads(path.with_suffix(".seconds.json").read_text())
        known = kept["records"] == records and kept["seconds"] is not None
        return float(kept["seconds"]) if known else math.nan
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return math.nan


@contextmanager
def open_run(directory: Path, manifest: dict[str, Any]) -> Iterator[None]:
    """Create a run directory, or check that the one there is this run; inside, write there alone.

    Inside, Ctrl-C and SIGTERM end the run (:func:`~pav.core.signals.interruptible`), and a full
    disk is one line; after either the same command resumes.

    Raises:
        UserError: if it holds something else, another configuration or a live writer, or cannot be
            written.
    """
    with _take(directory, json.loads(json_text(manifest))):
        try:
            with interruptible():
                yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise unwritable(directory, error) from error


def _take(directory: Path, manifest: dict[str, Any]) -> Lock:
    """The lock of a run directory that belongs to ``manifest`` by then."""
    path, temporary = directory / MANIFEST, directory / f".{MANIFEST}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        others = sorted({p.name for p in directory.iterdir()} - {LOCK, temporary.name})
        if others and not path.exists():
            raise UserError(
                f"output {str(directory)!r} is not empty and no run of this command "
                f"(it holds {others[0]!r}); choose another output"
            )
        with ExitStack() as stack:
            lock = stack.enter_context(Lock(directory / LOCK, directory))
            if not path.exists() or _is_another(directory, manifest):
                replace_file(path, json_text(manifest))
            stack.pop_all()
        return lock
    except OSError as error:
        raise UserError(
            f"output {str(directory)!r} is not writable ({error.strerror}); choose another"
        ) from error


def _is_another(directory: Path, manifest: dict[str, Any]) -> bool:
    """Whether a run directory without any record is another run's; one with records is refused."""
    found = read_object(directory / MANIFEST, "restore it, or choose another output")
    said = other_configuration(found, manifest)
    if said and any(p.stat().st_size for p in directory.rglob("*.jsonl")):
        raise UserError(f"output {str(directory)!r} was {said}")
    if said:
        print(f"nothing in {directory} was finished: it is claimed anew")
    return bool(said)
