"""The embedded task that no grader can check: a tape told as a paragraph.

The tapes are those of :mod:`pav.tasks.tape`. A solution is a chain of the tape's lines, the tag
``A``, and a paragraph that tells the end and the running totals in free wording::

    37+8=45
    45*3=35
    35-15=20
    20+6=26
    AThis is a short note about the tape. The final total (=26) was ...

The end comes first, so no text before it works it out: who wrote no chain has to guess. A paragraph
has more forms than can be counted and the reference is one of them, so no sample is equal to it.
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
from pav.tasks.tape import Tape, apply, draw_question, parse

TAG = "A"
# Of the solutions that ``pav.sft`` learns from: the rest has no chain at all.
FULL_CHAINS, CUT_CHAINS = 0.7, 0.15

# ``{a|b}`` is a choice, ``#`` what the display told, such as (+8=45) or, at the end, (=26). No word
# begins with a capital A, the tag.
OPENINGS = (
    "{Here|This|Below} is {the|a} {short|brief|plain} {report|account|note} {of|about} the"
    " {tape|strip|roll}",
    "The {clerk|owner|teller} {read|checked|followed} the {tape|strip|roll} {once|twice|again} and"
    " noted {this|everything} down",
    "{Someone|Somebody} {asked|wanted} to {know|hear} what the {machine|calculator|register} had"
    " {done|printed}",
)
ENDS = (
    "{In the end|Finally|By the close} the {display|counter|dial} # {was|looked} {settled|steady}",
    "The {final|closing} {total|sum|value} # {was|is} {copied|taken} from the {whole|entire}"
    " {tape|strip|roll}",
    "What {remains|stays} # {when|once} {every|each} {key|button} has been {pressed|used|hit}",
)
TELLINGS = (
    "the {key|button} # {moved|turned|set} the {display|counter|dial} {quickly|slowly}",
    "one {line|entry} # {was|stood} {on|in} the {machine|calculator|register}",
    "{nobody|hardly anyone} {saw|missed} the {total|sum|value} # {there|below}",
    "the {clerk|owner|teller} {read|marked} # {by hand|in ink|in pencil}",
)
JOINTS = ("; ", ", {and|while|but} ", ". {Besides|Moreover|Indeed|Meanwhile} ")
CLOSINGS = (
    "{Every|Each} {key|button|line} was {checked|read} {once|twice|again} and nothing was"
    " {left out|skipped}",
    "The {machine|calculator|register} was then {switched|turned} off and the {tape|strip|roll}"
    " {put|filed} away",
    "{Nobody|Hardly anyone} {doubted|questioned} {this|everything} and the {clerk|owner|teller}"
    " closed the {book|shop} {early|late}",
)
GRAMMAR = (OPENINGS, ENDS, TELLINGS, JOINTS, CLOSINGS)
_CHOICE = re.compile(r"\{([^{}]*)\}")
_WORD = re.compile(r"[A-Za-z]+")
_TOLD = re.compile(r"\(([+*-][0-9]+)?=([0-9]+)\)")


class Truth(NamedTuple):
    """What a text tells of a tape.

    Attributes:
        share: of the keys but the last, and the end, those whose totals are told and no others.
        whole: whether that is all of them, and nothing else is told.
    """

    share: float
    whole: bool


@dataclass(frozen=True)
class Ledger(Task):
    """The tape as a paragraph (see the module); nothing is graded.

    Args:
        n_ops: operations in a problem, 4 to 6.
    """

    n_ops: int = 4

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
            chain = _lines(question)
            kind = rng.random()
            if kind >= FULL_CHAINS:
                chain = chain[: rng.randrange(self.n_ops) if kind < FULL_CHAINS + CUT_CHAINS else 0]
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
        words = set(_WORD.findall(" ".join(t for part in GRAMMAR for t in part)))
        tokens = [*f"0123456789+-*={TAG}\n.,;)", " ("]
        tokens += sorted(word for word in words if word[0].isupper())
        tokens += sorted(f" {word}" for word in words)
        return tokens, rf" ?(?!{TAG})[A-Za-z][a-z]*| \(|[\s\S]"

    def true_totals(self, text: str, problem: Problem) -> Truth:
        """What the paragraph of a whole solution tells, for evaluation only.

        ``(+8=45)`` tells the total after a key, ``(=26)`` the end. Without a tag nothing is told.
        """
        keys, totals = _keys(problem.question), running_totals(problem.question)
        expected = {"": {str(totals[-1])}}
        for key, total in zip(keys[:-1], totals, strict=False):
            expected.setdefault(key, set()).add(str(total))
        told: dict[str, set[str]] = {}
        for key, total in _TOLD.findall(text.partition(TAG)[2]):
            told.setdefault(key, set()).add(total)
        right = sum(told.get(key) == found for key, found in expected.items())
        return Truth(right / len(expected), right == len(expected) == len(told))


def running_totals(question: str) -> list[int]:
    """The display after each key; the last one is the end."""
    value, operations = parse(question)
    return list(accumulate(operations, lambda total, key: apply(total, *key), initial=value))[1:]


def _keys(question: str) -> list[str]:
    return [f"{op}{operand}" for op, operand in parse(question)[1]]


def _lines(question: str) -> list[str]:
    """The right chain, a key in a line."""
    totals = running_totals(question)
    before = [parse(question)[0], *totals]
    return [f"{x}{key}={z}" for x, key, z in zip(before, _keys(question), totals, strict=False)]


def tell(rng: Random, question: str) -> str:
    """A true paragraph about ``question`` in some wording."""
    *totals, end = running_totals(question)
    text = f"{_wording(rng, OPENINGS)}. {_wording(rng, ENDS).replace('#', f'(={end})')}"
    tellings = list(zip(_keys(question), totals, strict=False))
    rng.shuffle(tellings)
    for key, total in tellings:
        text += _wording(rng, JOINTS) + _wording(rng, TELLINGS).replace("#", f"({key}={total})")
    return f"{text}. {_wording(rng, CLOSINGS)}."


def _wording(rng: Random, templates: tuple[str, ...]) -> str:
    return _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), rng.choice(templates))
