"""Where a chain of thought ends, and the reference answer begins.

A solution is a chain, an opening tag, the answer and a closing tag. A likelihood reward reads the
reference answer where the policy's own would stand. The last character of a tag of two or more is
left to what follows it: tokenizers merge ``>`` with the text after it, ``<answer`` with nothing. So
chain and reference meet at the end of a token in every tokenizer (arXiv 2602.03979, Section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pav.core.errors import UserError
from pav.core.steps import Ending
from pav.policy.encoding import encode_after, eos_id
from pav.policy.policy import Policy
from pav.tasks.base import Problem, Task


@dataclass(frozen=True)
class Tags:
    """Text that opens and closes an answer (see :attr:`pav.tasks.base.Task.answer_tags`)."""

    opening: str
    closing: str

    @property
    def stem(self) -> str:
        """Of the opening tag, what a chain ends with."""
        return _stem(self.opening)

    @property
    def end(self) -> str:
        """Of the closing tag, what ends an answer; empty where only end-of-sequence does."""
        return _stem(self.closing)


def _stem(tag: str) -> str:
    return tag[:-1] if len(tag) > 1 else tag


@dataclass(frozen=True)
class At:
    """Sampling ends with the token that completes ``text``.

    Attributes:
        text: what is waited for; empty never ends anything.
        policy: whose tokens.
    """

    text: str
    policy: Policy

    @property
    def is_watching(self) -> bool:
        """Whether there is anything to wait for."""
        return bool(self.text)

    @cached_property
    def _last(self) -> frozenset[int]:
        """Tokens that can complete the text: they hold it, or begin with an end of it."""
        tokenizer = self.policy.tokenizer
        said = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        tails = tuple(self.text[i:] for i in range(len(self.text)))
        return frozenset(i for i, t in enumerate(said) if t.startswith(tails) or self.text in t)

    def is_solution(self, ids: Sequence[int]) -> bool:
        """Whether the last tokens of ``ids`` hold the text."""
        if not ids or ids[-1] not in self._last:
            return False
        # A token is at least a character, but for those that are a part of one.
        return self.text in self.policy.text(list(ids[-len(self.text) - 4 :]))


@dataclass(frozen=True)
class Chain:
    """A sampled solution, cut where the reference answer takes over.

    Attributes:
        ids: of the chain, its opening tag included.
        is_tagged: whether the policy opened an answer. Where it did not (it ended without, or was
            cut by the length cap), all it wrote is the chain, and the opening tag is forced and is
            a part of the reference: how improbable it is then is what not opening an answer costs.
    """

    ids: list[int]
    is_tagged: bool


def chain_of(policy: Policy, tags: Tags, ids: Sequence[int]) -> Chain:
    """The chain of solution ``ids``.

    Without tags it is all steps but the last where the solution is whole, else all whole steps.
    """
    stepper = policy.stepper
    ids = list(ids)
    if not tags.opening:
        ends = [0, *stepper.step_ends(ids)]
        is_whole = len(ends) > 1 and ends[-1] == len(ids) and stepper.is_solution(ids)
        return Chain(ids[: ends[-2] if is_whole else ends[-1]], is_whole)
    cut = _token_end(policy, ids, tags.stem)
    if cut is not None:
        # A token that holds the tag and the beginning of an answer is no part of the chain.
        _, _, after = policy.text(ids[:cut]).partition(tags.stem)
        return Chain(
            ids[: cut if tags.opening[len(tags.stem) :].startswith(after) else cut - 1], True
        )
    return Chain(ids, False)


def _token_end(policy: Policy, ids: list[int], text: str) -> int | None:
    """Exclusive end of the first token after which ``text`` has been said; None if it never is."""
    if text not in policy.text(ids):
        return None
    low, high = 0, len(ids)
    while high - low > 1:
        middle = (low + high) // 2
        if text in policy.text(ids[:middle]):
            high = middle
        else:
            low = middle
    return high


def reference_ids(
    policy: Policy, task: Task, tags: Tags, problem: Problem, answer: str, chain: Chain
) -> list[int]:
    """The reference answer as it follows ``chain``, with what ends it.

    Args:
        policy: whose tokens.
        task: has the form of an answer where there are no tags.
        tags: of the answer.
        problem: what is solved.
        answer: its reference.
        chain: what it follows.

    Raises:
        UserError: if the problem has no reference.
    """
    if not answer:
        raise UserError(
            f"problem {problem.id} has no reference answer; likelihood rewards need one for every "
            "problem"
        )
    eos = [] if tags.end else [eos_id(policy)]
    if not tags.opening:
        forced = Problem(problem.id, problem.question, answer)
        text = task.forced_answer(forced)
        return [*encode_after(policy, policy.stepper.rule.delimiter, text), *eos]
    said, tag = policy.text(chain.ids), tags.opening
    # What of the opening tag the chain has said is not asked for again.
    opened = next(tag[:k] for k in range(len(tag), -1, -1) if said.endswith(tag[:k]))
    text = tag[len(opened) :] + answer + tags.end
    return [*encode_after(policy, opened or policy.stepper.rule.delimiter, text), *eos]


def endings(policy: Policy, tags: Tags) -> tuple[Ending, Ending]:
    """Where sampling ends: of chains alone, and of whole solutions."""
    whole = At(tags.end, policy) if tags.end else policy.stepper
    return (At(tags.stem, policy) if tags.opening else whole), whole


def answer_in(policy: Policy, tags: Tags, ids: Sequence[int]) -> str | None:
    """The answer between the tags of a solution; None where none was opened."""
    said = policy.text(ids)
    if not tags.opening:
        return said
    _, opened, answer = said.partition(tags.opening)
    return answer.partition(tags.end)[0] if opened and tags.end else answer if opened else None
