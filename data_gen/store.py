"""The crash-safe label store: a checksummed journal, sealed into Parquet.

A finished rollout is first one line of ``journal.jsonl`` (CRC-32, space, JSON). ``seal`` writes the
three tables by temporary name, fsync and rename and then empties the journal. A torn line is owed
again, never a crash. A directory belongs to one configuration: another is refused.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic, time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pav.core.errors import FULL, UserError, unwritable
from pav.core.files import json_text, replace_file
from pav.core.journal import JOURNAL, journal_line, journal_lines
from pav.core.lock import LOCK, Lock
from pav.core.manifest import other_configuration
from pav.labels.files import checked_manifest
from pav.labels.tables import (
    COMPLETIONS,
    LABELS,
    TRACES,
    Completion,
    Key,
    Trace,
    place,
    remember,
    sealed,
)

MANIFEST = "manifest.json"
# What a manifest says of how far a run is, not of what it is.
_FREE = {"partial"}


class Store:
    """One label run on disk. Use as a context manager; one writer at a time.

    Args:
        directory: created if missing.
        manifest: what the run is; a directory with another is refused, naming the keys.

    Attributes:
        traces: solutions by trace id.
        completions: rollouts by (prefix key, policy, index).

    Raises:
        UserError: if the directory holds something else, another configuration, or a live writer.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.traces: dict[str, Trace] = {}
        self.completions: dict[Key, Completion] = {}
        self._start: float | None = None
        self._seconds_before = 0.0
        self._solutions: int | None = None
        self._owed: int | None = None
        self._failed = ""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(directory)
            self._lock = Lock(directory / LOCK, directory)
        except OSError as error:
            raise UserError(
                f"output {str(directory)!r} is not writable ({error.strerror}); choose another"
            ) from error
        try:
            # As it reads on disk: tuples are lists there.
            self._check(json.loads(json_text(manifest)))
            self._unsealed = not (directory / "traces").exists()
            self._replay()
            self._open_journal()
        except OSError as error:
            self._lock.close()
            raise unwritable(self.directory, error) from error
        except BaseException:
            self._lock.close()
            raise

    def _check(self, manifest: dict[str, Any]) -> None:
        path = self.directory / MANIFEST
        if path.exists():
            found = read_manifest(self.directory)
            said = other_configuration(found, manifest, _FREE)
            if not said:
                return
            if _holds_rows(self.directory):
                raise UserError(f"output {str(self.directory)!r} was {said}")
            print(f"nothing in {self.directory} was finished: it is claimed anew")
            (self.directory / JOURNAL).unlink(missing_ok=True)
        replace_file(path, json_text(manifest))

    def _replay(self) -> None:
        for kind, row in sealed(self.directory):
            remember(kind, row, self.traces, self.completions)
        path = self.directory / JOURNAL
        if not path.exists():
            return
        whole = end = damaged = 0
        for line, entry in journal_lines(path):
            end += len(line)
            if entry is None:
                damaged += 1
                continue
            self._seconds_before = entry.get("t") or self._seconds_before
            if entry["kind"] == "run":
                self._solutions = entry["record"]["solutions"]
                self._owed = entry["record"].get("owed")
            else:
                self._unsealed = True
                remember(entry["kind"], entry["record"], self.traces, self.completions)
            if not damaged:
                whole = end
        if not damaged:
            return
        good = [line for line, entry in journal_lines(path) if entry is not None]
        if sum(map(len, good)) == whole:  # only the end is torn: it was never acknowledged
            os.truncate(path, whole)
            return
        print(
            f"WARNING: {damaged} lines of {path} are damaged; what they held is owed again",
            file=sys.stderr,
        )
        replace_file(path, b"".join(good))

    def _open_journal(self) -> None:
        self._journal = (self.directory / JOURNAL).open("ab", buffering=0)
        self._size = os.fstat(self._journal.fileno()).st_size

    @property
    def seconds(self) -> float:
        """Seconds that this run has been worked on, earlier starts included."""
        now = monotonic()
        return self._seconds_before + now - (now if self._start is None else self._start)

    def announce(self, solutions: int) -> None:
        """Start the clock; write down how many solutions the run is to have.

        ``data_gen.status`` reads both.
        """
        self._start = monotonic()
        self._solutions = solutions
        self._append("run", self._run_record())

    def add(self, record: Trace | Completion) -> None:
        """Append one finished rollout; after the return it survives the death of the process.

        Raises:
            UserError: if it cannot be written (full disk); the journal then ends as before.
        """
        self._append("trace" if isinstance(record, Trace) else "completion", vars(record))
        self._unsealed = True
        place(record, self.traces, self.completions)

    def _append(self, kind: str, record: dict[str, Any]) -> None:
        if self._failed:
            raise UserError(self._failed)
        line = journal_line(kind, record, self.seconds)
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._journal.write(rest) :]
        except BaseException as error:
            # Half a line would swallow the next one.
            with suppress(OSError):
                self._journal.truncate(self._size)
            if not isinstance(error, OSError):
                raise
            full = unwritable(self.directory, error)
            self._failed = str(full)
            raise full from error
        self._size += len(line)

    def seal(
        self, fingerprints: dict[str, str], changed: bool = False, owed: int | None = None
    ) -> None:
        """Write the tables and empty the journal.

        Args:
            fingerprints: rollout policy name -> fingerprint.
            changed: whether records were replaced in memory, so that the tables are out of date.
            owed: solutions that are missing or not finished; None if nobody knows.
        """
        if not (self._unsealed or changed):
            return
        self._owed = owed
        try:
            self._write("traces", TRACES, [vars(t) for t in self.traces.values()])
            self._write("completions", COMPLETIONS, [vars(c) for c in self.completions.values()])
            self._write("labels", LABELS, count(self.completions, fingerprints))
            replace_file(
                self.directory / JOURNAL, journal_line("run", self._run_record(), self.seconds)
            )
            self._journal.close()
            self._open_journal()
        except OSError as error:
            raise unwritable(self.directory, error) from error
        self._unsealed = False

    def _run_record(self) -> dict[str, Any]:
        return {"solutions": self._solutions, "owed": self._owed, "at": time()}

    def _write(self, folder: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
        target = self.directory / folder / "part-00000.parquet"
        target.parent.mkdir(exist_ok=True)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
        replace_file(target, sink.getvalue().to_pybytes())

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: object = None, error: object = None, *_: object) -> None:
        # Some network file systems report a full disk only here.
        try:
            os.fsync(self._journal.fileno())
            self._journal.close()
        except OSError as late:
            if kind is None:
                raise unwritable(self.directory, late) from late
        finally:
            self._lock.close()
        if isinstance(error, OSError) and error.errno in FULL:
            raise unwritable(self.directory, error) from error


def count(completions: dict[Key, Completion], fingerprints: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of the table ``labels``: the rollouts counted by prefix and policy."""
    counts: dict[tuple[str, str], dict[str, Any]] = {}
    for c in completions.values():
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
    return list(counts.values())


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a label run.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(
            f"labels {str(directory)!r} has no {MANIFEST}; give a directory that data_gen.rollouts "
            "or data_gen.merge wrote"
        )
    return checked_manifest(path)


def _holds_rows(directory: Path) -> bool:
    """Whether a run has finished anything; a torn end of the journal never counted as that."""
    journal = directory / JOURNAL
    lines = journal_lines(journal) if journal.exists() else ()
    return next(sealed(directory), None) is not None or any(
        entry is None or entry["kind"] != "run" for line, entry in lines if line.endswith(b"\n")
    )


def _refuse_foreign(directory: Path) -> None:
    """Raise where a directory without manifest holds more than a run that died at its start."""
    names = {p.name for p in directory.iterdir()}
    others = sorted(names - {LOCK, f".{MANIFEST}.tmp"})
    if others and MANIFEST not in names:
        raise UserError(
            f"output {str(directory)!r} is not empty and no label run (it holds {others[0]!r}); "
            "choose another directory"
        )
