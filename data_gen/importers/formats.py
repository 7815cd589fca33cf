"""Public data sets of labelled steps, as they lie in their files.

``math_shepherd``
    ``input``: problem and steps, each step closed by the tag ``ки``; ``label``: the same text with
    ``+`` or ``-`` in place of the tag (arXiv 2312.08935).
``prm800k``
    ``question.problem``, ``question.ground_truth_answer`` and ``label.steps``, of which each has
    ``completions`` (``text`` and ``rating``: 1, 0 or -1), the ``chosen_completion`` that the
    solution goes on with, or a ``human_completion`` (arXiv 2305.20050). Ratings of 0 and 1 count as
    right, as in its paper; every alternative step is a label, too.
``trl``
    ``prompt``, ``completions`` (one text per step) and ``labels`` (one truth value per step).
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pav.core.errors import UserError
from pav.core.text import check_text

Format = Literal["math_shepherd", "prm800k", "trl"]
_TAG = "ки"
_FIRST_STEP = re.compile(r"Step 1\s*:")
_ANSWER = re.compile(r"[Tt]he answer is:?\s*(.+?)\s*$")


@dataclass(frozen=True)
class ImportedStep:
    """One step; ``label`` is None where nobody judged it (or another solution carries it)."""

    text: str
    label: bool | None


@dataclass(frozen=True)
class ImportedSolution:
    """A solution whose steps are labelled.

    Attributes:
        question: the problem.
        gold: the reference answer, where the row tells it.
        steps: at least one.
        complete: whether it goes to the end, so that the last label is its outcome.
    """

    question: str
    gold: str | None
    steps: list[ImportedStep]
    complete: bool


def read_solutions(
    path: str, layout: Format, limit: int | None, bad: list[str] | None = None
) -> Iterator[list[ImportedSolution]]:
    """The solutions of each of the first ``limit`` rows; none for a row that its authors gave up.

    Args:
        path: ``.jsonl``, ``.jsonl.gz`` or ``.parquet``.
        layout: its layout.
        limit: rows to read; all by default.
        bad: takes what is wrong with every row that is not of that layout, which is passed over.

    Raises:
        UserError: naming line and field, if a row is not of that layout and ``bad`` is None.
    """
    parse = {"math_shepherd": _math_shepherd, "prm800k": _prm800k, "trl": _trl}[layout]
    for where, row in islice(_rows(path), limit):
        try:
            found = parse(_object(row, where), where)
        except UserError as error:
            if bad is None:
                raise UserError(f"{error} (or leave such rows out: --skip_bad_rows)") from error
            bad.append(str(error))
            continue
        yield found


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, row); a row of JSON lines as its bytes."""
    file = Path(path).expanduser()
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            number = 0
            for batch in pq.ParquetFile(file).iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"data {path} row {number}", row
            return
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"data {path} line {number}", line
    except (OSError, EOFError, zlib.error, ValueError) as error:  # pyarrow's are ValueErrors
        raise UserError(
            f"data {path!r} cannot be read ({error}); give a .jsonl, .jsonl.gz or .parquet file"
        ) from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); write one JSON object a line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object; write one object a line")
    check_text(row, where)
    return row


def _field(row: Any, names: str, kind: type, where: str) -> Any:
    """The value at a dotted path; a message names the whole path."""
    value: Any = row
    for name in names.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, kind):
        wanted = "text" if kind is str else "a list"
        raise UserError(f"{where}: {names} is {repr(value)[:60]}; it must be {wanted}")
    return value


def _math_shepherd(row: dict[str, Any], where: str) -> list[ImportedSolution]:
    text, labelled = (_field(row, name, str, where) for name in ("input", "label"))
    pieces = text.split(_TAG)
    if pieces.pop().strip():
        raise UserError(f"{where}: input does not end with the tag {_TAG!r}; every step needs one")
    steps: list[ImportedStep] = []
    cursor = 0
    for number, piece in enumerate(pieces, 1):
        mark = labelled[cursor + len(piece) : cursor + len(piece) + 1]
        if not labelled.startswith(piece, cursor) or mark not in ("+", "-"):
            raise UserError(
                f"{where}: label does not follow input at step {number}; it must be the same text "
                f"with + or - in place of {_TAG!r}"
            )
        cursor += len(piece) + 1
        steps.append(ImportedStep(piece.strip(), mark == "+"))
        if not piece.strip():
            raise UserError(f"{where}: input has an empty step {number}; mend or drop the line")
    # The last one: a problem may list steps of its own.
    first = [*_FIRST_STEP.finditer(steps[0].text)][-1:] if steps else []
    start = first[0].start() if first else 0
    question = steps[0].text[:start].strip() if steps else ""
    if not question:
        raise UserError(f"{where}: input has no problem before 'Step 1:'; mend or drop the line")
    steps[0] = ImportedStep(steps[0].text[start:], steps[0].label)
    answer = _ANSWER.search(steps[-1].text)
    return [
        ImportedSolution(question, answer[1] if answer and steps[-1].label else None, steps, True)
    ]


def _prm800k(row: dict[str, Any], where: str) -> list[ImportedSolution]:
    question = _field(row, "question.problem", str, where)
    gold = row["question"].get("ground_truth_answer")
    reason = _field(row, "label.finish_reason", str, where)
    if reason in ("bad_problem", "give_up"):
        return []
    path: list[ImportedStep] = []
    found: list[ImportedSolution] = []
    for number, step in enumerate(_field(row, "label.steps", list, where)):
        at = f"label.steps[{number}]"
        if not isinstance(step, dict):
            raise UserError(f"{where}: {at} is {repr(step)[:60]}; it must be an object")
        offered = [
            _completion(c, f"{at}.completions[{i}]", where)
            for i, c in enumerate(step.get("completions") or [])
        ]
        chosen = step.get("chosen_completion")
        if chosen is not None and not (type(chosen) is int and 0 <= chosen < len(offered)):
            raise UserError(
                f"{where}: {at}.chosen_completion is {chosen!r}; it must be null or a number below "
                f"{len(offered)}"
            )
        # The solution itself carries the labels of its steps; an alternative only its own.
        before = [ImportedStep(s.text, None) for s in path]
        found += [
            ImportedSolution(question, gold, [*before, other], False)
            for i, other in enumerate(offered)
            if i != chosen and other.label is not None
        ]
        if chosen is not None:
            path.append(offered[chosen])
        elif step.get("human_completion") is not None:
            path.append(_completion(step["human_completion"], f"{at}.human_completion", where))
        else:
            break
    if path:
        complete = reason == "solution" and path[-1].label is not None
        found.insert(0, ImportedSolution(question, gold, path, complete))
    return found


def _completion(value: Any, at: str, where: str) -> ImportedStep:
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {at}.text is {repr(text)[:60]}; it must be text")
    rating = value.get("rating")
    if rating not in (None, -1, 0, 1) or isinstance(rating, bool):
        raise UserError(f"{where}: {at}.rating is {rating!r}; it must be -1, 0, 1 or null")
    return ImportedStep(text.strip(), None if rating is None else rating >= 0)


def _trl(row: dict[str, Any], where: str) -> list[ImportedSolution]:
    prompt = _field(row, "prompt", str, where)
    completions, labels = (_field(row, name, list, where) for name in ("completions", "labels"))
    if not completions or len(completions) != len(labels):
        raise UserError(
            f"{where}: completions has {len(completions)} entries, labels {len(labels)}; give one "
            "label per step, and at least one step"
        )
    for i, (text, label) in enumerate(zip(completions, labels, strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: completions[{i}] is {repr(text)[:60]}; it must be text")
        if label not in (0, 1):
            raise UserError(f"{where}: labels[{i}] is {label!r}; it must be true or false")
    if not prompt.strip():
        raise UserError(f"{where}: prompt is empty; it must be the problem")
    steps = [ImportedStep(t.strip(), bool(k)) for t, k in zip(completions, labels, strict=True)]
    return [ImportedSolution(prompt.strip(), None, steps, True)]
