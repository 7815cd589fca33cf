"""LaTeX as math-verify reads it right: what it would misread is spelled out, or not given to it."""

from __future__ import annotations

import re

from pav.grading.numbers import SIGNS, SPACES, TEXT, UNIT, spelled_out

_TIMES_I = re.compile(r"\\(?:cdot|times)\s*i(?![a-zA-Z])")
_AND = re.compile(rf",?\s*{TEXT}\{{\s*,?\s*(?:and|or)\s*\}}")
# A unit at the end of a number that the answer or a part of it ends with.
_UNIT = re.compile(rf"(?<=[^\s,;(\[{{=])\s*{UNIT}(?=\s*(?:[,;)\]]|\\\}}|\\right|\Z))")
_BUILDER = re.compile(
    r"\\\{\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?\s*)?(?:\||\\mid|\\vert|:|\\colon)"
    r"([^{}|]*)\\\}"
)
_RATIO = re.compile(r"[^:,=]+(?::[^:,=]+){2,}")
# What math-verify drops or multiplies: an ellipsis, numbers side by side, numbers around a word,
# what a set is built with, an end that infinity does not have.
_MISREAD = re.compile(
    r"\\(?:ldots|cdots|dots)(?![a-zA-Z])|\.\.\."
    rf"|(?<![_^0-9.])[0-9][0-9.]*{SPACES}[0-9]"
    r"|(?:\^\{?\\circ\}?|')\s*[0-9]"
    rf"|[0-9}}]\s*{TEXT}\{{[^{{}}]*\}}(?:\s*\^\s*[0-9])?\s*[0-9]"
    r"|\\\{[^{}]*(?:\||\\mid|:)[^{}]*\\\}"
    r"|\[\s*[-+]?\s*\\infty|\\infty\s*(?:\\right\s*)?\]"
)
_BARE_FRACTION = re.compile(r"(\\[dt]?frac|\\binom)\s*([0-9])\s*([0-9])")


def readable(latex: str) -> str:
    """``latex`` for math-verify, meaning the same; empty where it would read something else."""
    text = spelled_out(latex.strip().rstrip(".").replace("\N{DEGREE SIGN}", "^\\circ "))
    text = _TIMES_I.sub("i", _AND.sub(",", text))
    text = _UNIT.sub("", _BARE_FRACTION.sub(r"\1{\2}{\3}", text))
    built = _BUILDER.fullmatch(text)
    if built is not None and built[1] in built[2] and re.search(r"[<>]|\\[lg]e", built[2]):
        text = built[2]  # {x | 1 < x} is 1 < x
    if _RATIO.fullmatch(text):
        first, *others = text.split(":")
        text = "(" + ", ".join(f"\\frac{{{other}}}{{{first}}}" for other in others) + ")"
    return "" if _MISREAD.search(text) else text.translate(SIGNS)
