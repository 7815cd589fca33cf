"""What a label run sees of its own work while it goes on: shares, time left, and when to stop."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from data_gen.strategies import Plan
from pav.core.errors import UserError
from pav.labels.tables import Completion, Trace
from pav.tasks.base import Task

# At so many finished solutions and rollouts the run asks whether it is worth going on. Several
# times, because what finishes first is short: with thousands in flight the first are never cut.
LOOKS = (200, 400, 800, 1600)
MOST = 0.5
# Steps of a solution, until the first one tells.
GUESSED_STEPS = 8


class Doubtful(UserError):
    """The first few hundred rollouts say that the run is not worth going on with."""


@dataclass
class Watch:
    """Counts of what a run has sampled.

    Args:
        graded: whether the task grades at all.
        stops: whether it raises where the counts are bad.
    """

    graded: bool = True
    stops: bool = False
    finished: int = 0
    truncated: int = 0
    right: int = 0
    unread: int = 0
    traces: int = 0
    steps: int = 0

    def see(self, record: Trace | Completion) -> None:
        """Count a finished solution or rollout.

        Raises:
            Doubtful: where the counts are bad and it is time to look at them.
        """
        self.count(record)
        if self.finished in LOOKS:
            self.look()

    def recall(self, records: Iterable[Trace | Completion], policies: Container[str]) -> None:
        """Count what ``policies`` sampled in earlier starts.

        Raises:
            Doubtful: where the counts are bad.
        """
        for record in records:
            if record.policy in policies:
                self.count(record)
        self.look()

    def count(self, record: Trace | Completion) -> None:
        """Count a finished solution or rollout."""
        self.finished += 1
        self.truncated += record.truncated
        self.right += record.correct
        self.unread += record.answer is None
        if isinstance(record, Trace):
            self.traces += 1
            self.steps += len(record.step_ends)

    def look(self) -> None:
        """Raise :class:`Doubtful` where a few hundred are finished and the counts are bad."""
        if self.stops and self.finished >= LOOKS[0] and (doubt := self.doubt()):
            raise Doubtful(doubt)

    def doubt(self) -> str:
        """What is wrong with most of what was sampled, and what to do; empty if nothing is."""
        n = self.finished
        if self.truncated > MOST * n:
            return (
                f"{self.truncated} of {n} finished solutions and rollouts were cut by the length "
                "cap and count as wrong: raise sampler.max_length (prompt and solution together)"
            )
        if not self.graded:
            return ""
        if self.unread > MOST * n:
            return (
                f"in {self.unread} of {n} finished solutions and rollouts the grader of the task "
                "found no answer: see how the policy is asked (policy.prompt) and how it answers"
            )
        if n and not self.right:
            return (
                f"none of {n} finished solutions and rollouts is right: take a stronger policy or "
                "easier problems, or see how the policy is asked (policy.prompt)"
            )
        return ""

    @property
    def shares(self) -> str:
        """Truncated and right shares, for a progress line."""
        if not self.finished:
            return "none finished yet"
        return f"{self.truncated / self.finished:.0%} cut, {self.right / self.finished:.0%} right"


def watch_for(task: Task, stops: bool) -> Watch:
    """A watch over what is sampled for ``task``."""
    return Watch(task.is_graded, stops)


def tokens_per_solution(watch: Watch, plan: Plan, tokens: int, room: int) -> float:
    """Expected tokens of a solution and its rollouts, before many solutions are labelled.

    Args:
        watch: what is finished.
        plan: how rollouts are spent; as if every prefix got ``n_mc`` of them.
        tokens: sampled so far, those of requests in flight included.
        room: longest solution.
    """
    # Of lengths that are partly still growing, the sum over the number that ended is the estimate
    # for which a short one that ends first is no argument that all are short.
    length = min(room, tokens / watch.finished) if watch.finished else room
    prefixes = watch.steps / watch.traces if watch.traces else GUESSED_STEPS
    if plan.max_labelled_prefixes is not None:
        prefixes = min(prefixes, plan.max_labelled_prefixes)
    return length * (1 + plan.n_mc * len(plan.policies) * prefixes)


def minutes_left(
    solutions: int, done: int, tokens: int, seconds: float, per_solution: float
) -> float | None:
    """Expected minutes until all ``solutions`` of a start are labelled; None without any token.

    Args:
        solutions: to be labelled in this start.
        done: labelled in it.
        tokens: sampled in it, those of requests in flight included.
        seconds: since it began.
        per_solution: expected tokens of one (:func:`tokens_per_solution`); once a tenth are
            labelled what they took counts.
    """
    if not tokens:
        return None
    if done and done * 10 >= solutions:
        per_solution = tokens / done
    owed = max(0.0, solutions * per_solution - tokens)
    return owed / (tokens / max(seconds, 1e-9)) / 60
