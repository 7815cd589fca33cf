"""The embedded task that no grader can check: a tape told as a paragraph.

The tapes are those of :mod:`pav.tasks.tape`. A solution is a chain of the tape's lines, the tag
``A``, and a paragraph that tells the end and the running totals in free wording::

    37+8=45
    45*3=35
    35-15=20
    AThis is a short note about ... The final total is 20; the second key took the sum to 35; ...

The end comes first, so no text before it works it out: who wrote no chain has to guess. Every
sentence has thousands of forms and the reference is one of them, so a sample is never equal to it.
What a text tells can still be read: :meth:`Ledger.true_totals` is for evaluation, and nothing that
learns may call it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random
from typing import ClassVar, NamedTuple

from pav.core.errors import UserError
from pav.tasks.base import Grade, Problem, Split, Task, problem_id, split_of
from pav.tasks.tape import Tape, apply, draw_question, draw_solution, parse

TAG = "A"
ORDINALS = ("first", "second", "third", "fourth", "fifth")
# Of the solutions that ``pav.sft`` learns from: the rest has no chain at all.
FULL_CHAINS, CUT_CHAINS = 0.7, 0.15

# ``{a|b}`` is a choice, ``#`` the number, ``@`` the ordinal. No word begins with a capital A, the
# tag; a telling has its ordinal before its number, and neither comma nor stop.
OPENINGS = (
    "{Here|This|Below} is {the|a|one more} {short|brief|plain|simple} {report|account|note|record}"
    " {of|about|on} {the|a} {tape|strip|roll} {from|of} the {small|little|old|grey}"
    " {machine|calculator|register|adder}",
    "The {clerk|owner|teller|cashier} {read|checked|followed|studied} the {whole|entire|long}"
    " {tape|strip|roll} {once|twice|again|slowly} and {then|later|soon} {wrote|noted|jotted}"
    " {this|everything|it all} down",
    "{Someone|Somebody} {asked|wanted|wished} to {know|learn|hear} what the {small|little|old|grey}"
    " {machine|calculator|register|adder} had {done|printed|worked out} on"
    " {Monday|Tuesday|Friday|Sunday}",
)
ENDS = (
    "{In the end|Finally|By the close|When all was done} the {display|counter|dial|screen|window}"
    " {of the machine|up front|in view} {shows|reads|says|gives|holds} #",
    "The {final|closing|ultimate} {total|sum|value|figure|result} {of|on|for} the"
    " {whole|entire|long} {tape|strip|roll} {is|was|comes to|stands at|equals} #",
    "{What|Whatever} {remains|stays|is left} {when|once} {every|each} {key|button} has been"
    " {pressed|used|hit} {is|was|comes to|equals} #",
)
TELLINGS = (
    "{after|following|upon|behind} the @ {key|press|entry|stroke} the"
    " {display|counter|dial|screen|window} {showed|read|said|gave|held} #",
    "the @ {key|press|entry|stroke} {brought|took|moved|set|carried} the"
    " {total|sum|value|figure|count} to #",
    "{when|as|once} the @ {key|press|entry|stroke} was {down|done|in|through} the"
    " {running|current|interim} {total|sum|value|figure|count} {was|stood at|came to|equalled} #",
    "what the @ {key|press|entry|stroke} {left|put|kept} {in|on} the"
    " {machine|calculator|register|adder} was #",
    "it was the @ {key|press|entry|stroke} {that|which} made the {total|sum|value|figure|count} #",
)
JOINTS = (
    "; ",
    ", {and|while|but|whereas} ",
    ". {Besides|Moreover|On the way|Clearly|Indeed|Meanwhile|Of course} ",
)
CLOSINGS = (
    "{Every|Each} {key|entry|line} was {checked|read|counted} {once|twice|again} by {hand|eye} and"
    " {nothing|not one step} was {left out|skipped|forgotten}",
    "The {machine|calculator|register|adder} was {then|later|soon} {switched|turned} off and the"
    " {tape|strip|roll} {went|came|moved} {to|into} {the|a} {drawer|box|folder|cabinet}",
    "{Nobody|Hardly anyone|Not one person} {doubted|questioned|disputed} {it|these numbers|this}"
    " {then|later|since} and the {clerk|owner|teller|cashier} {closed|shut} the"
    " {book|shop|office} {happily|early|late}",
)
GRAMMAR = (OPENINGS, ENDS, TELLINGS, JOINTS, CLOSINGS)
_CHOICE = re.compile(r"\{([^{}]*)\}")
_WORD = re.compile(r"[A-Za-z]+")
_CLAUSE = re.compile(r"[.,;]")
_NUMBER = re.compile(r"[0-9]+")


class Truth(NamedTuple):
    """What a text tells of a tape.

    Attributes:
        share: of the running totals and the end, those told, and never told otherwise.
        whole: whether that is all of them, and nothing else is told.
    """

    share: float
    whole: bool


@dataclass(frozen=True)
class Ledger(Task):
    """The tape as a paragraph (see the module); nothing is graded.

    Args:
        n_ops: operations in a problem, 4 to 6.
        sft_short_cuts: share of lines of the chains ``pav.sft`` learns from that take two
            operations at once.
    """

    n_ops: int = 4
    sft_short_cuts: float = 0.15

    # Texts that open and close the answer; "" for the end of the solution.
    answer_tags: ClassVar[tuple[str, str]] = (TAG, "")

    def __post_init__(self) -> None:
        if not 4 <= self.n_ops <= 6:
            raise UserError(
                f"task.n_ops is {self.n_ops}; give 4 to 6, for which a paragraph has 60 to 120 "
                "tokens"
            )

    @property
    def is_graded(self) -> bool:
        """Never: an answer is no number, and no two have the same words."""
        return False

    def problems(self, split: Split) -> Iterator[Problem]:
        """Problems of the tape, endless; the wording of a reference depends on the id alone."""
        for problem in Tape(n_ops=self.n_ops).problems(split):
            yield replace(problem, gold=tell(Random(f"ledger/{problem.id}"), problem.question))

    def solutions(self, seed: int) -> Iterator[tuple[str, str]]:
        """Endless (question, solution) pairs of the train split, one stream per seed.

        Chains are whole, cut after any line or left out; what is told is true.
        """
        rng = Random(f"ledger solutions/{seed}")
        while True:
            question = draw_question(rng, self.n_ops)
            if split_of(problem_id(question)) != "train":
                continue
            *chain, _ = draw_solution(rng, question, self.sft_short_cuts).split("\n")
            kind = rng.random()
            if kind >= FULL_CHAINS:
                chain = chain[: rng.randrange(len(chain)) if kind < FULL_CHAINS + CUT_CHAINS else 0]
            yield question, "\n".join([*chain, TAG + tell(rng, question)])

    def grade(self, text: str, problem: Problem) -> Grade:
        """As ``grader: none``: there is nothing to grade."""
        return Grade(None, False)

    def length_cap(self, longest_prompt: int) -> int:
        """Of prompt and solution together."""
        return 224

    def forced_answer(self, problem: Problem) -> str:
        """The tag and the reference."""
        return f"{TAG}{problem.gold}"

    def vocabulary(self) -> tuple[list[str], str]:
        """Tokens of a policy that is trained from scratch, and the pattern that finds them.

        The tape's characters, and words and digits with the space before them.
        """
        words = {*ORDINALS, *_WORD.findall(" ".join(t for part in GRAMMAR for t in part))}
        tokens = [*f"0123456789+-*={TAG}\n.,; ", *(f" {digit}" for digit in range(10))]
        tokens += sorted(word for word in words if word[0].isupper())
        tokens += sorted(f" {word}" for word in words)
        return tokens, rf" ?(?!{TAG})[A-Za-z][a-z]*| ?[0-9]|[\s\S]"

    def true_totals(self, text: str, problem: Problem) -> Truth:
        """What the paragraph of a whole solution tells, for evaluation only.

        A clause with a number tells a running total if it names its key (``the second key``), else
        the end. Without a tag nothing is told.
        """
        *totals, end = map(str, running_totals(problem.question))
        told: dict[str, set[str]] = {}
        for clause in _CLAUSE.split(text.partition(TAG)[2]):
            key = next((word for word in _WORD.findall(clause) if word in ORDINALS), "")
            for number in _NUMBER.findall(clause):
                told.setdefault(key, set()).add(number)
        expected = {**dict(zip(ORDINALS, totals, strict=False)), "": end}
        right = sum(told.get(key) == {total} for key, total in expected.items())
        return Truth(right / len(expected), right == len(expected) == len(told))


def running_totals(question: str) -> list[int]:
    """The display after each key; the last one is the end."""
    value, operations = parse(question)
    return list(accumulate(operations, lambda total, key: apply(total, *key), initial=value))[1:]


def tell(rng: Random, question: str) -> str:
    """A true paragraph about ``question`` in some wording."""
    *totals, end = running_totals(question)
    text = f"{_wording(rng, OPENINGS)}. {_wording(rng, ENDS).replace('#', str(end))}"
    tellings = list(zip(ORDINALS, totals, strict=False))
    rng.shuffle(tellings)
    for ordinal, total in tellings:
        telling = _wording(rng, TELLINGS).replace("@", ordinal).replace("#", str(total))
        text += _wording(rng, JOINTS) + telling
    return f"{text}. {_wording(rng, CLOSINGS)}."


def _wording(rng: Random, templates: tuple[str, ...]) -> str:
    return _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), rng.choice(templates))
