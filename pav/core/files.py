"""Files that are whole or not there at all, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pav.core.errors import UserError


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write ``path`` so that a reader sees the old file or the new one, never half of either.

    Args:
        path: the file.
        write: called with the stream of a file beside it, which takes its place when it is whole.

    Raises:
        OSError: if it cannot be written; what was there before still is.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    # Without this a power cut may undo the rename; some file systems cannot.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def replace_file(path: Path, content: bytes | str) -> None:
    """Write ``path`` at once (see :func:`write_whole`)."""
    plain = content.encode() if isinstance(content, str) else content
    write_whole(path, lambda stream: stream.write(plain))


@contextmanager
def whole_directory(output: Path) -> Iterator[Path]:
    """A directory beside ``output`` to fill; it takes its place when all is in it.

    Raises:
        OSError: if it cannot be made, or ``output`` holds something by then.
    """
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def damage(path: Path) -> str:
    """What is wrong with a checkpoint, a zip file, by its checksums; empty where it is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return f"the checksum of {torn!r} is wrong" if torn else ""


def finite(value: Any) -> Any:
    """Plain data with None for every number that is not finite: NaN and infinity are no JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def json_text(value: Any, indent: int | None = 1) -> str:
    """``value`` as JSON, with null for numbers that are not finite."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, none where there is no file; torn lines are left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object in ``path``.

    Args:
        path: the file.
        fix: what the user can do where it is damaged.

    Raises:
        UserError: if it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except RecursionError:
        reason = "it is nested too deeply"
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 ({error.reason} at byte {error.start})"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    else:
        if isinstance(found, dict):
            return found
        reason = f"it holds a {type(found).__name__}, not an object"
    raise UserError(f"{str(path)!r} cannot be read: {reason}; {fix}")
