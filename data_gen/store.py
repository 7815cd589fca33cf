"""The crash-safe label store: a checksummed journal, sealed into Parquet.

A finished rollout is first one line of ``journal.jsonl`` (CRC-32, space, JSON). ``seal`` writes the
three tables by temporary name, fsync and rename and then removes the journal. A torn last line is
owed again, never a crash. A directory belongs to one configuration: another is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pav.errors import UserError
from pav.labels import COMPLETIONS, LABELS, TRACES, Completion, Trace

Kind = Literal["trace", "completion"]
JOURNAL = "journal.jsonl"


class Store:
    """One label run on disk. Use as a context manager; one writer at a time.

    Args:
        directory: created if missing.
        manifest: what the run is; a directory with another is refused, naming the keys.

    Raises:
        UserError: if the directory holds something else, another configuration, or a live writer.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.traces: dict[str, Trace] = {}
        self.completions: dict[tuple[str, str, int], Completion] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(directory)
            self._lock = (directory / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"output {str(directory)!r} is not writable ({error.strerror}); choose another"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UserError(
                f"output {str(directory)!r} is being written by another process; wait for it or "
                "choose another directory"
            ) from error
        try:
            # As it reads on disk: tuples are lists there.
            self._check(json.loads(json.dumps(manifest)))
        except UserError:
            self._lock.close()
            raise
        for kind, record in self._replay():
            self._remember(kind, record)
        self._journal: IO[bytes] = (directory / JOURNAL).open("ab")

    def _check(self, manifest: dict[str, Any]) -> None:
        path = self.directory / "manifest.json"
        if not path.exists():
            _replace(path, json.dumps(manifest, indent=1).encode())
            return
        found = json.loads(path.read_text())
        changed = sorted(
            k for k in manifest.keys() | found.keys() if manifest.get(k) != found.get(k)
        )
        if changed:
            first = changed[0]
            raise UserError(
                f"output {str(self.directory)!r} was made with another {', '.join(changed)} "
                f"({first}: {found.get(first)!r} there, {manifest.get(first)!r} now); restore it, "
                "or choose another output"
            )

    def _replay(self) -> Iterator[tuple[Kind, dict[str, Any]]]:
        for folder, kind in (("traces", "trace"), ("completions", "completion")):
            for file in sorted((self.directory / folder).glob("*.parquet")):
                for row in pq.read_table(file).to_pylist():
                    yield kind, row  # type: ignore[misc]
        path = self.directory / JOURNAL
        if not path.exists():
            return
        good = 0
        with path.open("rb") as stream:
            for line in stream:
                record = _decode(line)
                if record is None:
                    break
                good += len(line)
                yield record["kind"], record["record"]
        # What follows the first bad line was never acknowledged.
        os.truncate(path, good)

    def _remember(self, kind: Kind, record: dict[str, Any]) -> None:
        if kind == "trace":
            trace = Trace(**record)
            self.traces[trace.trace_id] = trace
        else:
            completion = Completion(**record)
            key = (completion.prefix_key, completion.policy, completion.index)
            self.completions[key] = completion

    def add(self, record: Trace | Completion) -> None:
        """Append one finished rollout; after the return it survives the death of the process."""
        kind: Kind = "trace" if isinstance(record, Trace) else "completion"
        plain = asdict(record)
        body = json.dumps({"kind": kind, "record": plain}, separators=(",", ":")).encode()
        self._journal.write(b"%08x %b\n" % (zlib.crc32(body), body))
        self._journal.flush()
        self._remember(kind, plain)

    def seal(self, fingerprints: dict[str, str]) -> None:
        """Write the tables and drop the journal.

        Args:
            fingerprints: rollout policy name -> fingerprint.
        """
        if (self.directory / JOURNAL).stat().st_size == 0 and (self.directory / "traces").exists():
            return
        counts: dict[tuple[str, str], dict[str, Any]] = {}
        for c in self.completions.values():
            row = counts.setdefault(
                (c.prefix_key, c.policy),
                {
                    "prefix_key": c.prefix_key,
                    "problem_id": c.problem_id,
                    "policy": c.policy,
                    "policy_fingerprint": fingerprints[c.policy],
                    "first_index": c.index,
                    "n": 0,
                    "k": 0,
                    "truncated": 0,
                    "tokens": 0,
                },
            )
            row["first_index"] = min(row["first_index"], c.index)
            row["n"] += 1
            row["k"] += int(c.correct)
            row["truncated"] += int(c.truncated)
            row["tokens"] += len(c.ids)
        self._write("traces", TRACES, [asdict(t) for t in self.traces.values()])
        self._write("completions", COMPLETIONS, [asdict(c) for c in self.completions.values()])
        self._write("labels", LABELS, list(counts.values()))
        self._journal.close()
        _replace(self.directory / JOURNAL, b"")
        self._journal = (self.directory / JOURNAL).open("ab")

    def _write(self, folder: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
        target = self.directory / folder / "part-00000.parquet"
        target.parent.mkdir(exist_ok=True)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
        _replace(target, sink.getvalue().to_pybytes())

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: Any) -> None:
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._journal.close()
        self._lock.close()


def _refuse_foreign(directory: Path) -> None:
    """Raise where a directory without manifest holds more than a run that died at its start."""
    names = {p.name for p in directory.iterdir()}
    others = sorted(names - {".lock", ".manifest.json.tmp"})
    if others and "manifest.json" not in names:
        raise UserError(
            f"output {str(directory)!r} is not empty and no label run (it holds {others[0]!r}); "
            "choose another directory"
        )


def _decode(line: bytes) -> dict[str, Any] | None:
    """The record of a journal line; None where it is torn or its checksum fails."""
    if not line.endswith(b"\n") or len(line) < 10:
        return None
    try:
        if zlib.crc32(line[9:-1]) != int(line[:8], 16):
            return None
        record: dict[str, Any] = json.loads(line[9:-1])
    except ValueError:
        return None
    return record


def _replace(path: Path, content: bytes) -> None:
    """Write ``path`` so that a reader sees the old file or the new one, never half of either."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
