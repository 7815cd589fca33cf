"""Graders: what a solution's text gives as its answer, and whether that is the reference's.

What is graded was written by a model and is treated as hostile: every grader takes linear time, and
``math`` compares what is no plain number in a process with limits (``pav/math_worker.py``).
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal
from typing import Literal

from pav.math_worker import MAX_ANSWER, compare
from pav.plain_number import LIST, MAX_DIGITS, SIGNS, SPACING, equal_numbers, plain_number
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
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac([0-9])([0-9])")
_TIMES_I = re.compile(r"\\(?:cdot|times)\s*i(?![a-zA-Z])")


def grade_text(grader: Grader, text: str, gold: str | None) -> Grade:
    """Grade the text of a solution against ``gold``, a reference answer made by :func:`reference`.

    - ``number``: the first number after the last ``####``; without that mark the number in the last
      ``\\boxed{}``, else the last number of the text. Compared exactly: 18, 18.0 and $18 are equal.
    - ``boxed``: the last balanced ``\\boxed{}``, compared as text after normalisation.
    - ``exact``: the last line, stripped.
    - ``math``: the last ``\\boxed{}`` or, without any, what math-verify finds at the end of the
      text. Plain numbers are compared exactly, the same text is equal, and the rest is compared
      by math-verify. Too long or too large to compute counts as wrong.
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

    For ``boxed`` and ``math`` a reference without ``\\boxed{}`` is the answer itself; for ``none``
    it is the whole text.
    """
    if grader == "number":
        return number_of(text)
    if grader == "exact":
        return last_line(text)
    if grader == "none":
        return text.strip() or None
    inner = last_boxed(text)
    inner = text.strip() if inner is None else inner.strip()
    if not inner or len(inner) > MAX_ANSWER:
        return None
    return normalise(inner) if grader == "boxed" else inner


def number_of(text: str) -> str | None:
    """The number that ``text`` answers with, canonical (``-1234.5``), or None."""
    text = _FRACTION.sub(r"\1/\2", text.translate(SIGNS).replace("{,}", ","))
    _, mark, tail = text.rpartition("####")
    if mark:
        return _canonical(_NUMBER.search(tail))
    inner = last_boxed(text)
    numbers = _NUMBER.finditer(text if inner is None else inner)
    return _canonical(next(iter(deque(numbers, maxlen=1)), None))


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
    stack: list[tuple[bool, int]] = []
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{" or token.startswith(("\\boxed", "\\fbox")):
            stack.append((token != "{", match.end()))
        elif token == "}" and stack:
            boxed, start = stack.pop()
            if boxed and (best is None or start > best[0]):
                best = (start, match.start())
    return None if best is None else text[slice(*best)]


def last_line(text: str) -> str | None:
    """The last line that is not blank, stripped, or None."""
    line = text.strip().rsplit("\n", 1)[-1].strip()
    return line if 0 < len(line) <= MAX_ANSWER else None


def _boxed_answer(text: str) -> str | None:
    inner = last_boxed(text)
    if inner is None or len(inner) > MAX_ANSWER:
        return None
    return normalise(inner) or None


def normalise(latex: str) -> str:
    """A LaTeX answer without what leaves its meaning as it is: spacing, ``\\text``, ``\\left``."""
    text = _TEXT.sub(r"\1", latex.translate(SIGNS))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("{,}", ",")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\%", "").replace("%", "")
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", SPACING.sub("", text.replace("\\$", "")))
    text = text.rstrip(".")
    number = None if LIST.search(latex) else _NUMBER.fullmatch(text)
    return (_canonical(number) if number else None) or text


_ANSWER = {"number": number_of, "boxed": _boxed_answer, "exact": last_line}


def _grade_math(text: str, gold: str | None) -> Grade:
    inner = last_boxed(text)
    if inner is None:  # without a box, an answer stands at the end
        reply = compare(_tidy(text[-MAX_ANSWER:]), _tidy(gold or ""))
        return Grade(reply.get("answer"), bool(reply.get("correct")))
    if len(inner) > MAX_ANSWER:
        return Grade(None, False)
    found, wanted = plain_number(inner), plain_number(gold or "")
    if found and wanted:
        verdict = equal_numbers(found, wanted)
        if verdict is not None:
            return Grade(str(found), verdict)
    plain = normalise(inner) or None
    same = bool(gold and plain == normalise(gold))
    # The gold answer has been read before, this spelling of it may be new.
    reply = compare(f"\\boxed{{{_tidy(gold if same and gold else inner)}}}", _tidy(gold or ""))
    answer = str(found) if found else reply.get("answer") or plain
    return Grade(answer, same or bool(reply.get("correct")))


def _tidy(latex: str) -> str:
    """Without what math-verify misreads: odd signs, a full stop, degrees, ``5\\cdot i``."""
    text = latex.translate(SIGNS).strip().rstrip(".").replace("\N{DEGREE SIGN}", "^\\circ ")
    return _TIMES_I.sub("i", text)
