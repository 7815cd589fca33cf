"""What a task is: problems by split, a prompt, a grader and a step rule.

A task is a frozen dataclass that subclasses :class:`Task`; nothing needs to be registered.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal

from pav.core.steps import StepRule
from pav.core.text import check_text

Split = Literal["train", "validation", "test"]
# Where the tasks are that a file's word is enough to import.
BUILT_IN = "pav.tasks."


@dataclass(frozen=True)
class Problem:
    """One problem. ``id`` is stable across runs; ``gold`` is the reference answer as text.

    ``others`` are further references, as good as ``gold``; likelihood rewards alone read them.

    Raises:
        UserError: if it holds what cannot be written: nothing is sampled for it.
    """

    id: str
    question: str
    gold: str | None = None
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_text(vars(self), f"problem {self.id!r}")


@dataclass(frozen=True)
class Grade:
    """What the grader read in a solution. ``answer`` is None where nothing could be parsed."""

    answer: str | None
    correct: bool


@dataclass(frozen=True)
class Task(ABC):
    """A task; subclass it as a frozen dataclass (see ``docs/tasks.md``).

    Its fields are its settings: they can be given on every command line (``--task.step_rule...``)
    and are stored with labels and verifiers.

    Args:
        step_rule: how solutions are cut into steps.
    """

    step_rule: StepRule = StepRule()

    # How policies are asked whose prompt.template is left as it is; no setting of the task.
    template: ClassVar[str] = "{question}\n"

    # Text that opens and closes the answer in a solution, e.g. ("<answer>", "</answer>"): what is
    # before it is the chain of likelihood rewards. No closing text: the answer ends with the
    # solution. No opening text: the last step is the answer (see forced_answer). No setting.
    answer_tags: ClassVar[tuple[str, str]] = ("", "")

    # Room for a solution, in tokens, where sampler.max_length is not given; no setting of the task.
    max_solution_tokens: ClassVar[int] = 1024

    @property
    def is_graded(self) -> bool:
        """Whether :meth:`grade` says anything; without it only likelihoods of ``gold`` are used."""
        return True

    @property
    def name(self) -> str:
        """What the task is called in output."""
        return type(self).__name__.lower()

    @property
    def fingerprint(self) -> str:
        """Names everything that changes what a label means; labels under another are refused."""
        return json.dumps(task_spec(self), sort_keys=True)

    @abstractmethod
    def problems(self, split: Split) -> Iterator[Problem]:
        """Problems of ``split``, always in the same order; may be endless."""

    @abstractmethod
    def grade(self, text: str, problem: Problem) -> Grade:
        """Grade the text of a whole solution (prompt excluded).

        What it raises for counts as wrong (``pav/grading/sandbox.py``). Graders of users are
        called in processes of their own, several at a time by ``search.serve``.
        """

    def length_cap(self, longest_prompt: int) -> int:
        """Cap on prompt and solution, in tokens, where ``sampler.max_length`` is not given."""
        return longest_prompt + self.max_solution_tokens

    def forced_answer(self, problem: Problem) -> str:
        """Text with which a solution would end if it gave the reference answer at once.

        Its likelihood after a step is a label that needs no rollouts (``data_gen.likelihood``).
        """
        return problem.gold or ""


def task_spec(task: Task) -> dict[str, Any]:
    """Class path and settings of a task, as plain data."""
    return {
        "class_path": f"{type(task).__module__}.{type(task).__qualname__}",
        "init_args": {f.name: _plain(getattr(task, f.name)) for f in fields(task) if f.init},
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        # ``final`` came later: what was made without it keeps its fingerprint.
        return {k: v for k, v in asdict(value).items() if k != "final" or v}
    return list(value) if isinstance(value, tuple) else value


def problem_id(question: str) -> str:
    """Stable id of a problem: a hash of its normalised text (NFKC, lower case, single spaces)."""
    check_text(question, f"question {question[:60]!r}")
    text = " ".join(unicodedata.normalize("NFKC", question).lower().split())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_of(pid: str) -> Split:
    """Hashed split of a problem id: 90% train, 5% validation, 5% test."""
    bucket = int(pid[:8], 16) % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"
