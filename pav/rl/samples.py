"""Sample traces of a run with what every step earned: ``samples.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pav.core.errors import UserError
from pav.core.files import json_rows, json_text

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class Sampled:
    """A trace that a run was trained on. S steps, P = S + 1 states.

    Attributes:
        iteration: that it was an update of.
        problem_id: of its problem.
        question: the problem.
        gold: its reference answer.
        answer: what the grader read.
        correct: what the grader said.
        truncated: whether the length cap ended it.
        version: of the policy that wrote it.
        verifier_version: of the policy that the verifier's base head was fitted to; None where that
            was not in this run.
        outcome: reward of the whole trace.
        steps: (S,) texts of its complete steps.
        tail: what follows them, where the length cap cut a step.
        gain: (S,) dense reward of every step.
        credit: (S,) what that adds to the weight of the step's tokens: alpha, lambda and centring
            included.
        q: head -> (P,) Q of every state; empty without a dense reward.
    """

    iteration: int
    problem_id: str
    question: str
    gold: str | None
    answer: str | None
    correct: bool
    truncated: bool
    version: int
    outcome: float
    steps: list[str]
    tail: str = ""
    gain: list[float] = field(default_factory=list)
    credit: list[float] = field(default_factory=list)
    q: dict[str, list[float]] = field(default_factory=dict)
    verifier_version: int | None = None

    @property
    def said(self) -> str:
        """How it ended, in a word."""
        return "truncated" if self.truncated else "right" if self.correct else "wrong"


def append_samples(directory: Path, traces: Sequence[Sampled]) -> None:
    """Add traces to those of a run."""
    with (directory / SAMPLES).open("a", encoding="utf-8") as stream:
        stream.writelines(json_text(asdict(trace), None) + "\n" for trace in traces)


def read_samples(directory: Path) -> list[Sampled]:
    """All sample traces of a run, in their order; a torn last line is left out.

    Raises:
        UserError: if they are no sample traces.
    """
    path = directory / SAMPLES
    try:
        return [Sampled(**row) for row in json_rows(path)]
    except TypeError as error:
        raise UserError(
            f"{str(path)!r} does not hold sample traces ({error}); give the output of pav.rl"
        ) from error
