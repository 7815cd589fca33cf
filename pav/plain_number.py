"""Plain numbers in LaTeX: read and compared exactly, without algebra.

Most answers of maths problems are such numbers. ``math-verify`` compares decimals rounded to six
places (it takes ``.0000672`` for ``.0000670``) and drops a number's base.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 100
SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-"})
# White space between two digits separates two numbers.
SPACING = re.compile(
    r"\\[,;:! ]|\\(?:left|right|quad|qquad|displaystyle)(?![a-zA-Z])"
    r"|(?<![0-9\s])\s+|\s+(?![0-9\s])|\$|~"
)
# "1, 234" is a list of two numbers, "1,234" is one.
LIST = re.compile(r"[0-9],\s")
_UNIT = re.compile(
    r"\\(?:text|textrm|textbf|mathrm|mbox)\s*\{[^{}0-9]*\}\s*(?:\^\s*(?:[23]|\{\s*[23]\s*\}))?\s*\Z"
)
_DEGREES = re.compile(r"\^\{?\\circ\}?|\\degree|\N{DEGREE SIGN}")
_THIN_COMMA = re.compile(r",\s*\\!\s*")
_BARE_ARGUMENT = re.compile(r"(\\frac|\\frac\{[0-9]+\}|\^|_)([0-9])")
_SLASH = re.compile(r"([-+]?)([0-9]+)/([0-9]+)")
_PLAIN = re.compile(
    r"(?P<sign>[-+]?)"
    r"(?:"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?P<decimals>\.[0-9]*)?"
    r"(?:[eE](?P<e>[-+]?[0-9]{1,3})|\\(?:times|cdot)10\^\{(?P<power>-?[0-9]{1,3})\})?"
    r"|(?P<mixed>[0-9,]*)\\frac\{(?P<top>[0-9]+)\}\{(?P<bottom>[0-9]+)\}"
    r")"
    r"(?:_\{(?P<base>[0-9]{1,2})\})?"
    r"(?P<percent>%?)"
)


class PlainNumber(NamedTuple):
    """A number that needs no algebra.

    Attributes:
        value: exact; digits are read as decimal ones whatever the base.
        base: subscript, or None.
        percent: whether it is written as a percentage.
        decimal: whether it is written with a decimal point.
    """

    value: Fraction
    base: int | None = None
    percent: bool = False
    decimal: bool = False

    def __str__(self) -> str:
        base = "" if self.base is None else f"_{self.base}"
        return f"{self.value}{base}{'%' * self.percent}"


def plain_number(latex: str) -> PlainNumber | None:
    """The number that ``latex`` is, its unit dropped; None where it is anything else.

    Plain are integers, decimals, fractions, mixed numbers and powers of ten, with a sign, a
    currency, a percent or degree sign and a base (``4210_5``).
    """
    if len(latex) > 2 * MAX_DIGITS:
        return None
    text = _UNIT.sub("", latex.translate(SIGNS).strip().rstrip("."))
    text = _THIN_COMMA.sub(",", text.replace("{,}", ",").replace("\\$", "").replace("\\%", "%"))
    if LIST.search(text):
        return None
    text = _DEGREES.sub("", SPACING.sub("", text))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    # Twice: \frac43 has two bare arguments.
    text = _BARE_ARGUMENT.sub(r"\1{\2}", _BARE_ARGUMENT.sub(r"\1{\2}", text))
    match = _PLAIN.fullmatch(_SLASH.sub(r"\1\\frac{\2}{\3}", text))
    if match is None:
        return None
    part = match.groupdict(default="")
    bottom = int(part["bottom"] or 1)
    exponent = int(part["e"] or part["power"] or 0)
    if not bottom or abs(exponent) > MAX_DIGITS:
        return None
    whole = (part["whole"] or part["mixed"] or "0").replace(",", "")
    value = Fraction(whole + part["decimals"]) * Fraction(10) ** exponent
    value += Fraction(int(part["top"] or 0), bottom)
    return PlainNumber(
        -value if part["sign"] == "-" else value,
        int(part["base"]) if part["base"] else None,
        bool(part["percent"]),
        bool(part["decimals"]),
    )


def equal_numbers(found: PlainNumber, wanted: PlainNumber) -> bool | None:
    """Whether two numbers are equal; None where one is a decimal and one an endless fraction.

    50% is both 50 and 1/2. A base that is left out is that of the question.
    """
    if found.base and wanted.base and found.base != wanted.base:
        return False
    values = {found.value}
    if found.percent != wanted.percent:
        values.add(found.value / 100 if found.percent else found.value * 100)
    if wanted.value in values:
        return True
    fraction = wanted if found.decimal else found
    return None if found.decimal != wanted.decimal and _is_endless(fraction.value) else False


def _is_endless(value: Fraction) -> bool:
    """Whether a fraction has no finite decimal form."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest != 1
