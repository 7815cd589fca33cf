"""Solutions with the place of their first error, in ProcessBench's public layout.

A file holds a JSON array or one JSON object a line::

    {"id": "gsm8k-0", "generator": "...", "problem": "...", "steps": ["...", "..."],
     "final_answer_correct": false, "label": 1}

``label`` is the index of the first wrong step, -1 where there is none. Source: arXiv 2412.06559 and
the data set ``Qwen/ProcessBench``, whose subsets are files of this layout.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pav.core.errors import UserError
from pav.core.text import check_text

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
CORRECT = -1


@dataclass(frozen=True)
class AnnotatedSolution:
    """A solution whose first error is known.

    Attributes:
        id: names it in output.
        problem: the question.
        steps: text of every step.
        label: index of the first wrong step, -1 if all are right.
    """

    id: str
    problem: str
    steps: list[str]
    label: int


def read_subsets(field: str, source: str) -> dict[str, list[AnnotatedSolution]]:
    """Solutions by subset: the files of a directory, or one file, by name without suffix.

    Raises:
        UserError: naming file, line and field of the first row that is not of the layout.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
        if not files:
            raise UserError(
                f"{field} {source!r} holds no {', '.join(SUFFIXES)} files; give ProcessBench's "
                "files or the directory that holds them"
            )
    elif path.is_file():
        files = [path]
    else:
        raise UserError(
            f"{field} {source!r} does not exist; give a file of ProcessBench's layout or a "
            "directory of them"
        )
    subsets: dict[str, list[AnnotatedSolution]] = {}
    for file in files:
        name = file.name
        for suffix in sorted(SUFFIXES, key=len, reverse=True):
            name = name.removesuffix(suffix)
        if name in subsets:
            raise UserError(f"{field} {source!r} holds two files of subset {name!r}; remove one")
        subsets[name] = _solutions(file)
    return subsets


def _solutions(file: Path) -> list[AnnotatedSolution]:
    solutions = [_solution(row, f"{file} line {line}") for line, row in _rows(file)]
    if not solutions:
        raise UserError(f"{file} holds no solutions; give a file of ProcessBench's layout")
    return solutions


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """(line at which it starts, row) of a JSON array or of JSON lines."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            text = stream.read().decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}); give a JSON file") from error
    decoder = json.JSONDecoder()
    position = len(text) - len(text.lstrip())
    is_array = text[position : position + 1] == "["
    position += is_array
    line, counted = 1, 0
    while True:
        while text[position : position + 1].isspace():
            position += 1
        line += text.count("\n", counted, position)
        counted = position
        if position == len(text) and not is_array:
            return
        if is_array and text[position : position + 1] == "]":
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise UserError(
                f"{file} line {line}: not JSON ({reason}); write a JSON array, or one object a line"
            ) from error
        yield line, row
        while is_array and text[position : position + 1].isspace():
            position += 1
        position += is_array and text[position : position + 1] == ","


def _solution(row: Any, where: str) -> AnnotatedSolution:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, not an object; write one object a row")
    check_text(row, where)

    def field(name: str, kind: type, what: str) -> Any:
        if name not in row:
            raise UserError(f"{where}: no field {name!r}; add it ({what})")
        if type(row[name]) is not kind:
            raise UserError(f"{where}: {name} is {_short(row[name])}; give {what}")
        return row[name]

    identity = field("id", str, "text")
    problem = field("problem", str, "the question as text")
    steps = field("steps", list, "a list of texts")
    label = field("label", int, f"the index of the first wrong step, or {CORRECT}")
    if "final_answer_correct" in row:
        field("final_answer_correct", bool, "true or false")
    if not problem.strip():
        raise UserError(f"{where}: problem is blank; give the question as text")
    if not steps:
        raise UserError(f"{where}: steps is empty; give at least one step")
    for i, step in enumerate(steps):
        if not isinstance(step, str):
            raise UserError(f"{where}: steps[{i}] is {_short(step)}; give text")
    if not any(step.strip() for step in steps):
        raise UserError(f"{where}: steps are all blank; give at least one with text")
    if not CORRECT <= label < len(steps):
        raise UserError(
            f"{where}: label is {label} with {len(steps)} steps; give the index of the first wrong "
            f"step (0 to {len(steps) - 1}), or {CORRECT}"
        )
    return AnnotatedSolution(identity, problem, steps, label)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
