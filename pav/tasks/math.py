"""MATH: competition problems with answers in LaTeX (arXiv 2103.03874)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pav.core.steps import StepRule
from pav.grading.kinds import Grader
from pav.tasks.jsonl import Jsonl


@dataclass(frozen=True)
class Math(Jsonl):
    """MATH from the hub or, with ``data`` and ``test``, from files.

    The split is that of *Let's Verify Step by Step* (arXiv 2305.20050): 12000 training problems and
    the 500 test problems of MATH-500. A step is a line, where lines that are shorter than
    ``min_tokens`` (those that open and close a formula) belong to the next one; the line with the
    answer in ``\\boxed{}`` ends a solution. The fields are those of
    :class:`~pav.tasks.jsonl.Jsonl`; 5% of ``data`` are for validation.
    """

    step_rule: StepRule = StepRule(min_tokens=4, final=r"\\boxed\{[^}]")
    data: str = "nlile/hendrycks-MATH-benchmark"
    test: str | None = "HuggingFaceH4/MATH-500"
    question_key: str = "problem"
    grader: Grader = "math"

    template: ClassVar[str] = (
        "Solve the problem step by step, one step per line. "
        "Put the final answer in \\boxed{}.\n\n{question}\n"
    )
