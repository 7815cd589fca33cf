"""Wrong answers made from right ones: a digit, sign, operator or bound of an answer changed."""

from __future__ import annotations

import re
from collections.abc import Iterator

# What a token may be changed into. A bracket that groups, as in 2(x+1), is no bound.
_OPERATORS = {
    "+": ["-"],
    "-": ["+"],
    "<": [">", "\\le "],
    ">": ["<", "\\ge "],
    "/": ["\\cdot "],
    "\\cdot": ["+"],
    "\\times": ["+"],
    "\\pm": ["+"],
    "\\le": ["<", "\\ge "],
    "\\leq": ["<", "\\geq "],
    "\\ge": [">", "\\le "],
    "\\geq": [">", "\\leq "],
    "\\cup": ["\\cap "],
    "\\cap": ["\\cup "],
    "\\sin": ["\\cos "],
    "\\cos": ["\\sin "],
    "\\infty": ["0"],
}
_BOUNDS = {"[": "(", "(": "[", "]": ")", ")": "]"}
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_INTERVAL = re.compile(r"([\[(])((?:[^\[\](),]|\\frac\{[^{}]*\}\{[^{}]*\})*,[^\[\](),]*)([\])])")


def mutated(gold: str) -> Iterator[str]:
    """Every answer that differs from ``gold`` by one digit, sign, operator or bound."""
    for match in _TOKEN.finditer(gold):
        token, (start, end) = match[0], match.span()
        changed = list(_OPERATORS.get(token, ()))
        if token.isdecimal():
            changed = [str((int(token) + step) % 10) for step in (1, 3)]
        for other in changed:
            yield gold[:start] + other + gold[end:]
    if re.match(r"\d|\\d?frac|\\sqrt|\\pi|[a-z]\b", gold):
        yield f"-{gold}"
    interval = "[" in gold or "]" in gold or "\\infty" in gold
    for match in _INTERVAL.finditer(gold) if interval else ():
        for at in (match.start(), match.end() - 1):
            yield gold[:at] + _BOUNDS[gold[at]] + gold[at + 1 :]
