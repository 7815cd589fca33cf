"""The journal of a label run: a line per finished record, with a checksum of its own."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JOURNAL = "journal.jsonl"
_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def journal_line(kind: str, record: dict[str, Any], seconds: float) -> bytes:
    """A line: CRC-32 of what follows, a space, JSON.

    Args:
        kind: "trace", "completion", or "run": how many solutions the run is to have (``solutions``)
            and how many it lacked when it was sealed (``owed``; None where nobody knows).
        record: of that kind.
        seconds: that the run has been worked on.
    """
    body = _JSON.encode({"kind": kind, "t": round(seconds, 1), "record": record}).encode()
    return b"%08x %b\n" % (zlib.crc32(body), body)


def journal_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """(line, entry) of a journal; an entry is None where its line is torn or damaged.

    An entry holds ``kind``, ``record`` and ``t``, the seconds (see :func:`journal_line`).
    """
    with path.open("rb") as stream:
        for line in stream:
            yield line, _decode(line)


def _decode(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n") or len(line) < 10:
        return None
    try:
        if zlib.crc32(line[9:-1]) != int(line[:8], 16):
            return None
        entry: dict[str, Any] = json.loads(line[9:-1])
    except (ValueError, RecursionError):
        return None
    return entry
