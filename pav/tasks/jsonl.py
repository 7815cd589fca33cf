"""A user's own problems: JSON lines files or data sets of the hub, with a built-in grader."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pav.core.errors import UserError
from pav.core.hub import offline_if_unreachable
from pav.core.text import check_text
from pav.grading.kinds import Grader, grade_text, reference
from pav.tasks.base import Grade, Problem, Split, Task, problem_id, split_of, task_spec

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]*){0,2}")
_NO_ANSWER = {
    "number": "no number",
    "boxed": "no answer",
    "exact": "no text on its last line",
    "math": "no answer",
    "none": "no text",
}


@dataclass(frozen=True)
class Jsonl(Task):
    """Problems with a question and a reference answer, one JSON object a line.

    Splits are made by a hash of the problem's text. With ``test``, 5% of ``data`` are for
    validation, the rest for training, and a problem that is also in ``test`` is in neither; without
    it, ``data`` is split into 90% train, 5% validation and 5% test. Repeated problems count once.

    Args:
        data: training problems: a ``.jsonl`` or ``.jsonl.gz`` file, or a data set of the hub as
            ``owner/name``, ``owner/name:config`` or ``owner/name:config:split`` (split: train).
        test: test problems, in the same form (split: test).
        question_key: key of the question.
        answer_key: key of the reference answer or reference solution; with grader ``none``, it may
            hold a list of answers that are as good as each other.
        grader: how an answer is read and compared: ``number``, ``boxed``, ``exact``, ``math``
            (math-verify), or ``none`` where only likelihoods of the reference are used.
    """

    data: str = ""
    test: str | None = None
    question_key: str = "question"
    answer_key: str = "answer"
    grader: Grader = "number"

    @property
    def is_graded(self) -> bool:
        """Unless the grader is ``none``."""
        return self.grader != "none"

    @property
    def fingerprint(self) -> str:
        """As every task's, with what is *in* the data in place of where it lies."""
        spec = task_spec(self)
        spec["init_args"] |= {"data": self._loaded.digest, "test": None}
        return json.dumps(spec, sort_keys=True)

    def problems(self, split: Split) -> Iterator[Problem]:
        """Problems of ``split`` by order of id, so that the first few are a fair sample.

        Raises:
            UserError: if the data cannot be read, or the split is empty.
        """
        problems = self._loaded.splits[split]
        if not problems:
            total = sum(map(len, self._loaded.splits.values()))
            raise UserError(
                f"task.data {self.data!r} leaves no problem for the {split} split ({total} "
                "problems in all, 5% of them for validation); give more problems"
            )
        return iter(problems)

    def grade(self, text: str, problem: Problem) -> Grade:
        """Grade ``text`` with the task's grader; see :func:`pav.grading.kinds.grade_text`."""
        return grade_text(self.grader, text, problem.gold)

    def row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """What a task that subclasses this one takes for a row of the data; None leaves it out."""
        return row

    def forced_answer(self, problem: Problem) -> str:
        """The reference answer in the form that the grader looks for first."""
        gold = problem.gold or ""
        form = {"number": "#### {}", "boxed": "\\boxed{{{}}}", "math": "\\boxed{{{}}}"}
        return form.get(self.grader, "{}").format(gold)

    @cached_property
    def _loaded(self) -> _Loaded:
        """The data, read once per task object."""
        digest = hashlib.sha256()
        data = self._read("data", self.data, "train", digest)
        splits: dict[Split, list[Problem]] = {"train": [], "validation": [], "test": []}
        if self.test is None:
            for problem in data.values():
                splits[split_of(problem.id)].append(problem)
        else:
            digest.update(b"test")
            test = self._read("test", self.test, "test", digest)
            splits["test"] = list(test.values())
            for problem in data.values():
                if problem.id not in test:
                    held_out = split_of(problem.id) == "validation"
                    splits["validation" if held_out else "train"].append(problem)
        for problems in splits.values():
            problems.sort(key=lambda problem: problem.id)
        return _Loaded(splits, digest.hexdigest()[:16])

    def _read(self, field: str, source: str, split: str, digest: Any) -> dict[str, Problem]:
        """Problems of ``source`` by id; what they say is added to ``digest``."""
        problems: dict[str, Problem] = {}
        for where, row in _rows(field, source, split):
            check_text(row, where)
            if isinstance(row, dict) and (row := self.row(row)) is None:
                continue
            question = self._value(row, "question_key", where)
            answer, others = self._answers(row, where)
            digest.update(json.dumps([question, answer, *others], allow_nan=False).encode())
            gold = reference(self.grader, answer)
            if gold is None:
                raise UserError(
                    f"{where}: {self.answer_key!r} holds {_NO_ANSWER[self.grader]}: "
                    f"{answer[:60]!r}; mend it, or choose another task.grader than {self.grader!r}"
                )
            pid = problem_id(question)
            problems.setdefault(pid, Problem(pid, question, gold, others))
        if not problems:
            raise UserError(f"task.{field} {source!r} holds no problems; give another file")
        return problems

    def _answers(self, row: Any, where: str) -> tuple[str, tuple[str, ...]]:
        """The reference answer, and others of a list."""
        given = row.get(self.answer_key) if isinstance(row, dict) else None
        if self.grader != "none" or not isinstance(given, list) or not given:
            return self._value(row, "answer_key", where), ()
        each = [self._value({self.answer_key: value}, "answer_key", where) for value in given]
        return each[0], tuple(each[1:])

    def _value(self, row: Any, key_field: str, where: str) -> str:
        key = getattr(self, key_field)
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object; write one object a line")
        if key not in row:
            there = ", ".join(map(repr, row)) or "none"
            raise UserError(
                f"{where}: no key {key!r}; there are {there}: set task.{key_field} to one of them"
            )
        value = row[key]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(
                f"{where}: {key!r} is {type(value).__name__}; it must be text or a number"
            )
        return str(value)


class _Loaded(NamedTuple):
    """What a task's files hold."""

    splits: dict[Split, list[Problem]]
    digest: str


def _rows(field: str, source: str, split: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) for every row of a file or a hub data set."""
    if not source:
        raise UserError(f"task.{field} is empty; give a .jsonl file or a data set of the hub")
    path = Path(source).expanduser()
    if path.is_file():
        yield from _file_rows(field, path)
    elif _HUB_ID.fullmatch(source) and not source.endswith((".jsonl", ".gz", ".json")):
        name, config, chosen = (source.split(":") + ["", ""])[:3]
        rows = _hub_rows(field, name, config or None, chosen or split)
        yield from ((f"task.{field} {source} row {i}", row) for i, row in enumerate(rows))
    else:
        raise UserError(
            f"task.{field} {source!r} is no file; give the path of a .jsonl or .jsonl.gz file, or "
            "a data set of the hub as owner/name"
        )


def _file_rows(field: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                where = f"task.{field} {path} line {number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{where}: not JSON ({error}); write one JSON object a line"
                    ) from error
                yield where, row
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"task.{field} {str(path)!r} cannot be read: {error}") from error


def _hub_rows(field: str, name: str, config: str | None, split: str) -> Any:
    if not Path(name).is_dir():
        offline_if_unreachable()
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client raises errors of half a dozen packages
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"task.{field} {name!r} (config {config}, split {split})"
        if isinstance(error, ConnectionError):
            raise UserError(
                f"{what} is not in the cache ({datasets.config.HF_DATASETS_CACHE}), and the hub "
                "cannot be reached; give a local file (--task.data problems.jsonl, and --task.test "
                "where the task has one), or name the cache that holds it in HF_DATASETS_CACHE"
            ) from error
        raise UserError(
            f"{what} cannot be loaded from the hub: {reason}; give owner/name:config:split, or the "
            "path of a .jsonl file"
        ) from error
