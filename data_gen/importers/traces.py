"""Solutions that the user already has: ``data_gen.rollouts --traces_from traces.jsonl``.

A line is a JSON object with the problem (``problem_id`` or ``question``) and the solution (``text``
or token ``ids``, prompt excluded); ``policy`` names its writer (default ``given``) and
``truncated: true`` marks a solution that did not end. A line may also be a record of a search
(``beam.jsonl``): all solutions of its final set are taken then, their writer named after the
search (``beam-16``). So a verifier is judged, and trained, on the prefixes that searching with it
visits.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_gen.labeler import PlannedTrace
from pav.core.errors import UserError
from pav.core.text import check_text
from pav.policy.encoding import eos_id
from pav.policy.policy import Policy
from pav.tasks.base import Problem, Split, problem_id

GIVEN = "given"


def digest(path: str) -> str:
    """Digest of a file's content.

    Raises:
        UserError: if it cannot be read.
    """
    return hashlib.sha256(_read(path)).hexdigest()[:16]


def given_rounds(
    path: str, problems: list[tuple[Split, Problem]], policy: Policy, max_length: int
) -> list[list[PlannedTrace]]:
    """Solutions of the file at ``path``, by rounds: the first of every problem, the second, ...

    Raises:
        UserError: naming the line, if one cannot be used.
    """
    known = {problem.id: (split, problem) for split, problem in problems}
    counts: Counter[tuple[str, str]] = Counter()
    per_problem: Counter[str] = Counter()
    rounds: list[list[PlannedTrace]] = []
    for where, row in _solution_rows(path):
        named = _text(row, "problem_id" if "problem_id" in row else "question", where)
        pid = named if "problem_id" in row else problem_id(named)
        if pid not in known:
            raise UserError(
                f"{where}: no problem {named!r} among the "
                f"{len(problems)} training and validation problems of this run; raise problems "
                "and validation_problems, or drop the line"
            )
        split, problem = known[pid]
        truncated = row.get("truncated", False)
        if not isinstance(truncated, bool):
            raise UserError(f"{where}: truncated is {truncated!r}; give true or false")
        ids = _solution(row, policy, truncated, where)
        length = len(policy.encode(problem)) + len(ids)
        if length > max_length:
            raise UserError(
                f"{where}: prompt and solution are {length} tokens, sampler.max_length is "
                f"{max_length}; raise it or drop the line"
            )
        writer = _text(row, "policy", where) if "policy" in row else GIVEN
        planned = PlannedTrace(split, problem, writer, counts[pid, writer], (ids, truncated))
        counts[pid, writer] += 1
        if per_problem[pid] == len(rounds):
            rounds.append([])
        rounds[per_problem[pid]].append(planned)
        per_problem[pid] += 1
    if not rounds:
        raise UserError(f"traces_from {path!r} holds no solutions; write one JSON object a line")
    return rounds


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(
            f"traces_from {path!r} cannot be read ({error.strerror}); give a .jsonl file"
        ) from error


def _solution_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of every solution in a file."""
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"traces_from {path} line {number}"
        row = _row(line, where)
        if "candidates" in row:
            yield from _searched(row, where)
        elif ("text" in row) == ("ids" in row):
            raise UserError(f"{where}: give the solution either as text or as ids")
        else:
            yield where, row


def _searched(record: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The final set of a search (:class:`search.run.records.Record`) as solutions."""
    writer = f"{record.get('method', 'search')}-{record.get('n', 0)}"
    candidates = record["candidates"]
    if not isinstance(candidates, list):
        raise UserError(
            f"{where}: candidates is {candidates!r:.60}; it must be a list of solutions"
        )
    for number, candidate in enumerate(candidates):
        if not isinstance(candidate, dict) or "ids" not in candidate:
            raise UserError(f"{where}: candidates[{number}] has no ids; search wrote it otherwise")
        yield (
            f"{where} candidate {number}",
            {
                "problem_id": record.get("problem_id"),
                "ids": candidate["ids"],
                "truncated": not candidate.get("finished", True),
                "policy": writer,
            },
        )


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); write one JSON object a line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object; write one object a line")
    check_text(row, where)
    return row


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        missing = "problem_id or question" if key == "question" else key
        raise UserError(f"{where}: {key} is {value!r}; give {missing} as text")
    return value


def _solution(row: dict[str, Any], policy: Policy, truncated: bool, where: str) -> list[int]:
    """Solution ids of a row; a solution that ended ends with EOS, or with its final step."""
    eos = policy.stepper.eos_ids
    size = len(policy.tokenizer)
    if "ids" in row:
        ids = row["ids"]
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < size for i in ids):
            raise UserError(
                f"{where}: ids must be token ids of the policy, whole numbers from 0 to {size - 1}"
            )
    else:
        text = _text(row, "text", where)
        ids = list(policy.tokenizer.encode(text, add_special_tokens=False))
        if policy.text(ids) != text:
            raise UserError(
                f"{where}: the tokenizer of {policy.config.model!r} turns the text into "
                f"{policy.text(ids)[:60]!r}; give ids, or mend the text"
            )
    if any(i in eos for i in ids[:-1]):
        raise UserError(f"{where}: an end-of-sequence token stands inside the solution; cut it")
    ends = policy.stepper.step_ends(ids)
    ended = ids[-1:] != [] and ids[-1] in eos
    if ends and policy.stepper.is_solution(ids[: ends[-1]]):
        # What comes after the final step would never have been sampled.
        ids, ended = ids[: ends[-1]], True
    if truncated and ended:
        raise UserError(f"{where}: truncated is true, but the solution has its final step")
    if not truncated and not ended:
        ids = [*ids, eos_id(policy)]
    return ids
