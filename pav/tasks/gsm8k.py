"""GSM8K: grade-school word problems whose answers are numbers (arXiv 2110.14168)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pav.core.steps import StepRule
from pav.grading.kinds import Grader
from pav.tasks.jsonl import Jsonl


@dataclass(frozen=True)
class Gsm8k(Jsonl):
    """GSM8K from the hub or, with ``data`` and ``test``, from files.

    A step is a line, as in the reference solutions; the line ``#### <number>`` ends a solution.
    The fields are those of :class:`~pav.tasks.jsonl.Jsonl`; 5% of ``data`` are for validation.
    """

    # A command line would read a text that begins with # as a comment.
    step_rule: StepRule = StepRule(final=r"\#{4}\s*[^\w#]{0,3}\d")
    data: str = "openai/gsm8k:main"
    test: str | None = "openai/gsm8k:main"
    grader: Grader = "number"

    template: ClassVar[str] = (
        "Solve the problem step by step, one short step per line. "
        "End with a line '#### <number>'.\n\n{question}\n"
    )
