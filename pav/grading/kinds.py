"""Graders: what a solution's text gives as its answer, and whether that is the reference's.

What is graded was written by a model and is treated as hostile: every grader takes linear time, and
``math`` compares what is no plain number in a process with limits (``pav/grading/math_worker.py``).
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal
from functools import lru_cache
from typing import Literal

from pav.grading.answer_forms import Choice, Clock, Quantities, choice, clock, quantities
from pav.grading.math_worker import MAX_ANSWER, compare
from pav.grading.numbers import (
    LIST,
    MAX_DIGITS,
    SIGNS,
    TEXT,
    PlainNumber,
    closed_up,
    equal_numbers,
    plain_number,
)
from pav.grading.readable import readable
from pav.tasks.base import Grade

Grader = Literal["number", "boxed", "exact", "math", "none"]

_NUMBER = re.compile(
    r"((?<![\w)\]}])[-+])?"  # a sign, not an operator
    r"\\?\$?"
    r"([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"
    r"(\.[0-9]+)?"
    r"([eE][-+]?[0-9]+)?"
    r"(\s?/\s?[0-9])?"  # a fraction is no decimal number: never read 1/2 as 1
)
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}")
_TEXT = re.compile(rf"{TEXT}\{{([^{{}}]*)\}}")
_SHORT_FRACTION = re.compile(r"\\frac([0-9])([0-9])")
# What follows a number, makes it a part of a calculation, a range, a time or a mixed number, ...
_GOES_ON = re.compile(
    r"\s*(?:[-+*/x^:\u00d7\u00b7\u00f7]|\\(?:times|cdot|div))\s*\\?\$?[0-9]|\s+[0-9]"
)
# ... unless its digits come in groups.
_GROUPED = re.compile(r"[0-9]{1,3}(?:[ \u00a0\u2009\u202f][0-9]{3})+(?![0-9])")
# Spellings of one sign.
_SYNONYMS = {
    **dict.fromkeys(["\\dfrac", "\\tfrac", "\\cfrac"], "\\frac"),
    **dict.fromkeys(["\\mid", "\\vert", "\\lvert", "\\rvert"], "|"),
    **dict.fromkeys(["\\dots", "\\cdots", "..."], "\\ldots"),
    "\\leq": "\\le",
    "\\geq": "\\ge",
    "\\neq": "\\ne",
    "\\colon": ":",
}
_COMMAND = re.compile(r"\\[a-zA-Z]+|\.\.\.")
# What may stand between the boxes of one answer beside a comma or a word: "$ and $x = ".
_FILLER = re.compile(
    rf"[\s$&{{}}]|\\[()\[\],;:! ]|\\q?quad|\\\\|{TEXT}|[a-zA-Z](?:_\w|_\{{\w+\}})?\s*="
)
_JOINTS = {",", ";", "and", "or", ",and", ",or"}
_MAX_GAP = 60


def grade_text(grader: Grader, text: str, gold: str | None) -> Grade:
    """Grade the text of a solution against ``gold``, a reference answer made by :func:`reference`.

    - ``number``: the first number after the last ``####``; without that mark the number in the last
      ``\\boxed{}``, else the last number of the text. Compared exactly: 18, 18.0 and $18 are equal.
    - ``boxed``: the last balanced ``\\boxed{}``, compared as text after normalisation; boxes that
      only a comma, "and" or "or" parts are one answer.
    - ``exact``: the last line, stripped.
    - ``math``: the last ``\\boxed{}`` (or boxes) or, without any, what math-verify finds at the end
      of the text. Plain numbers, times of day, choices and quantities of several units are compared
      exactly, the same text is equal, and of the rest the meaning is compared
      (``pav/grading/latex.py``). What cannot be read, or is too long or too large to compute, is
      right only as the same text.
    - ``none``: there is nothing to grade.

    ``answer`` is the canonical form that majority votes count: equal for answers that are equal,
    but for ``math`` not for every pair of equal expressions.
    Never raises on any text.

    Raises:
        UserError: if math-verify, or the process that it runs in, cannot be started.
    """
    if grader == "none":
        return Grade(None, False)
    if grader == "math":
        return _grade_math(text, gold)
    answer = _ANSWER[grader](text)
    return Grade(answer, answer is not None and answer == gold)


def reference(grader: Grader, text: str) -> str | None:
    """The answer in a reference solution, canonical as in :func:`grade_text`; None without one.

    For ``boxed`` and ``math`` a reference without ``\\boxed{}`` is the answer itself, and all boxes
    of one with several are; for ``none`` it is the whole text.
    """
    if grader == "number":
        return number_of(text)
    if grader == "exact":
        return last_line(text)
    if grader == "none":
        return text.strip() or None
    boxes = [text[start:end] for start, end in _boxes(text)]
    inner = _joined(boxes) if boxes else text.strip()
    if not inner or len(inner) > MAX_ANSWER:
        return None
    return normalise(inner) if grader == "boxed" else inner


def number_of(text: str) -> str | None:
    """The number that ``text`` answers with, canonical (``-1234.5``), or None."""
    text = _FRACTION.sub(r"\1/\2", text.translate(SIGNS).replace("{,}", ","))
    _, mark, tail = text.rpartition("####")
    inner = tail if mark else last_boxed(text)
    if inner is None:
        return _canonical(next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None))
    inner = _GROUPED.sub(lambda m: re.sub(r"\s", "", m[0]), inner)
    if not mark:
        return _canonical(next(iter(deque(_NUMBER.finditer(inner), maxlen=1)), None))
    match = _NUMBER.search(inner)
    if match is not None and _GOES_ON.match(inner.partition("\n")[0], match.end()):
        return None
    return _canonical(match)


def _canonical(match: re.Match[str] | None) -> str | None:
    """Plain decimal notation without trailing zeros; None for fractions and monstrous numbers."""
    if match is None:
        return None
    sign, whole, decimals, exponent, fraction = match.groups(default="")
    digits = whole.replace(",", "") + decimals
    if fraction or len(digits) > MAX_DIGITS or len(exponent) > 4:
        return None
    # Digits and exponent are bounded, so this is a string of at most about 1100 characters; string
    # work, not arithmetic, because Decimal rounds to its context's precision.
    plain = format(Decimal(sign + digits + exponent), "f")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    negative = plain.startswith("-")
    plain = plain.lstrip("+-").lstrip("0") or "0"
    plain = "0" + plain if plain.startswith(".") else plain
    return "-" + plain if negative and plain != "0" else plain


def last_boxed(text: str) -> str | None:
    """Content of the ``\\boxed{...}`` (or ``\\fbox``) that opens last and is closed, or None."""
    boxes = _boxes(text)
    return text[slice(*boxes[-1])] if boxes else None


def _boxes(text: str) -> list[tuple[int, int]]:
    """(start, end) of what is in every closed box without a box in it, in the order of the text."""
    stack: list[tuple[bool, int]] = []
    found: list[tuple[int, int]] = []
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{" or token.startswith(("\\boxed", "\\fbox")):
            stack.append((token != "{", match.end()))
        elif token == "}" and stack:
            boxed, start = stack.pop()
            # One that closes after another has opened in it is around that one.
            if boxed and (not found or start > found[-1][0]):
                found.append((start, match.start()))
    return found


def _last_boxes(text: str) -> tuple[str, str] | None:
    """(the answer in the last box and those that it is joined with, what all boxes hold)."""
    boxes = _boxes(text)
    if not boxes:
        return None
    first = len(boxes) - 1
    while first and _is_joint(text, boxes[first - 1][1] + 1, boxes[first][0]):
        first -= 1
    contents = [text[start:end] for start, end in boxes]
    return _joined(contents[first:]), _joined(contents)


def _is_joint(text: str, start: int, end: int) -> bool:
    if end - start > _MAX_GAP:
        return False
    gap = text[start:end].removesuffix("{").rstrip().removesuffix("\\boxed").removesuffix("\\fbox")
    return _FILLER.sub("", gap) in _JOINTS


def _joined(contents: list[str]) -> str:
    """The contents of boxes as one answer; those that say the same count once."""
    said = {str(plain_number(c) or normalise(c)): c.strip() for c in contents if c.strip()}
    return ", ".join(said.values())


def last_line(text: str) -> str | None:
    """The last line that is not blank, stripped, or None."""
    line = text.strip().rsplit("\n", 1)[-1].strip()
    return line if 0 < len(line) <= MAX_ANSWER else None


def _boxed_answer(text: str) -> str | None:
    boxes = _last_boxes(text)
    if boxes is None or len(boxes[0]) > MAX_ANSWER:
        return None
    return normalise(boxes[0]) or None


def normalise(latex: str) -> str:
    """A LaTeX answer without what leaves its meaning as it is: spacing, ``\\text``, ``\\left``."""
    text = _TEXT.sub(r"\1", latex.translate(SIGNS))
    text = _COMMAND.sub(lambda m: _SYNONYMS.get(m[0], m[0]), text).replace("{,}", ",")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\%", "").replace("%", "")
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", closed_up(text.replace("\\$", "")))
    text = text.removesuffix(".")
    number = None if LIST.search(latex) else _NUMBER.fullmatch(text)
    return (_canonical(number) if number else None) or text


_ANSWER = {"number": number_of, "boxed": _boxed_answer, "exact": last_line}


def _grade_math(text: str, gold: str | None) -> Grade:
    boxes = _last_boxes(text)
    if boxes is None:  # without a box, an answer stands at the end
        reply = compare(text[-MAX_ANSWER:], readable(gold or ""), boxed=False)
        return Grade(reply.get("answer"), bool(reply.get("correct")))
    answer, whole = boxes
    grade = _grade_answer(answer, gold)
    if not grade.correct and answer != whole and "," in (gold or ""):
        # Case by case: "If x > 0, ... \boxed{3}. Otherwise ... \boxed{-3}."
        return Grade(grade.answer, _grade_answer(whole, gold).correct)
    return grade


def _grade_answer(latex: str, gold: str | None) -> Grade:
    if len(latex) > MAX_ANSWER:
        return Grade(None, False)
    found, wanted = _without_algebra(latex), _without_algebra(gold or "")
    plain = normalise(latex) or None
    same = bool(gold and plain == normalise(gold))
    vote = None if found is None else str(found)
    equal = _are_equal(found, wanted)
    if equal is not None:
        return Grade(vote or plain, same or equal)
    # The gold answer has been read before, this spelling of it may be new.
    formula, reference = readable(gold if same and gold else latex), readable(gold or "")
    reply = compare(f"\\boxed{{{formula}}}", reference) if formula else {}
    return Grade(vote or reply.get("answer") or plain, same or bool(reply.get("correct")))


Form = Choice | Clock | Quantities | PlainNumber


# A reference is read for every one of its answers.
@lru_cache(maxsize=1 << 12)
def _without_algebra(latex: str) -> Form | None:
    for read in (choice, clock, quantities, plain_number):
        if found := read(latex):
            return found
    return None


def _are_equal(found: Form | None, wanted: Form | None) -> bool | None:
    """Whether two answers that need no algebra are equal; None where that takes algebra."""
    match found, wanted:
        case PlainNumber() as number, PlainNumber() as other:
            return equal_numbers(number, other)
        case Choice() as letter, Choice() as other:
            return letter.equals(other)
        case Clock() as time, Clock() as other:
            return time.equals(other)
        case Quantities() as amounts, Quantities() as other:
            return amounts.equals(other)
        case (Clock() as time, _) | (_, Clock() as time):
            return None if time.could_be_ratio else False
    return None
