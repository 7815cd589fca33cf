"""Plain numbers in LaTeX: read and compared exactly, without algebra.

Most answers of maths problems are such numbers. ``math-verify`` compares decimals rounded to six
places (it takes ``.0000672`` for ``.0000670``), drops a number's base and multiplies what stands
side by side (``12 000`` is 0).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 100
SIGNS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-"}
    | dict.fromkeys("\u00a0\u2009\u202f", " ")
)
SPACES = r"(?:\s|\\[,;:! ]|~|\\q?quad(?![a-zA-Z]))+"
# "1, 234" is a list of two numbers, "1,234" is one.
LIST = re.compile(r"[0-9],\s")
TEXT = r"\\(?:text(?:rm|bf|it|sf|tt|normal)?|math(?:rm|bf|it|sf)|mbox)\s*"
# A word, or an abbreviation that is no product of variables.
WORD = r"(?:[A-Za-z]{3,}|cm|mm|km|kg|mg|ml|mL|lb|oz|ft|yd|mi|hr|cc|sq|cu|of|a\.m|p\.m)\.?"
UNIT = (
    rf"(?:{TEXT}\{{[^{{}}0-9]*\}}|(?<=[0-9 ]){WORD}(?:\s+{WORD})*)"
    r"\s*(?:\^\s*(?:[23]|\{\s*[23]\s*\}))?"
)

_SPACING = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\$|" + SPACES)
_BETWEEN_DIGITS = re.compile(rf"(?<=[0-9]){SPACES}(?=[0-9])")
_GROUPED = re.compile(
    rf"(?<![0-9.,_^])[0-9]{{1,3}}(?:{SPACES}[0-9]{{3}})+(?![0-9,])(?!{SPACES}[0-9]|\s*/)"
)
_MIXED = re.compile(rf"([0-9]){SPACES}([0-9]+)\s*/\s*([0-9]+)(?![0-9])")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{([0-9]+)\}")
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(
    rf"(?<=[0-9}}])(?:{SPACES})?({TEXT}\{{\s*)?({'|'.join(_POWERS)})s?(?![a-zA-Z])", re.IGNORECASE
)
# "\text{23 students}": a number that its text begins with.
_IN_TEXT = re.compile(rf"\A({TEXT}\{{)\s*([-+]?(?:\\\$)?[0-9][0-9.,]*)(?=[^0-9:]*\}})")
_PERCENT = re.compile(r"(?:\\text\{\s*)?(?<![a-zA-Z])percent(?:age)?(?![a-zA-Z])(?:\s*\})?")
_UNIT = re.compile(rf"(?<!\A)\s*{UNIT}\s*\Z")
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
        places: digits after the decimal point; None where it is not written with one.
        unit: as it is written, without spaces; empty without one.
    """

    value: Fraction
    base: int | None = None
    percent: bool = False
    places: int | None = None
    unit: str = ""

    def __str__(self) -> str:
        base = "" if self.base is None else f"_{self.base}"
        return f"{self.value}{base}{'%' * self.percent}"


def spelled_out(latex: str) -> str:
    """``latex`` with its numbers in one notation.

    Digits in groups (``12 000``) are joined, mixed numbers (``2 1/2``) and repeating decimals
    (``0.\\overline{3}``) are fractions, scale words (``1.5 million``) powers of ten.
    """
    text = _IN_TEXT.sub(r"\2\1", latex.translate(SIGNS))
    text = _THIN_COMMA.sub(",", text.replace("{,}", ","))
    text = _GROUPED.sub(lambda m: re.sub(SPACES, "", m[0]), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _REPEATING.sub(_fraction, text)
    return _SCALE.sub(lambda m: f"\\times10^{{{_POWERS[m[2].lower()]}}}{m[1] or ''}", text)


def _fraction(match: re.Match[str]) -> str:
    whole, start, repeated = match.groups()
    if len(match[0]) > MAX_DIGITS:
        return match[0]
    value = int(whole + start + repeated) - int(whole + start or "0")
    return f"\\frac{{{value}}}{{{'9' * len(repeated)}{'0' * len(start)}}}"


def closed_up(latex: str) -> str:
    """``latex`` without white space, but for one space between digits: those are two numbers."""
    parts = _BETWEEN_DIGITS.split(latex)
    return " ".join(_SPACING.sub("", part) for part in parts)


def plain_number(latex: str) -> PlainNumber | None:
    """The number that ``latex`` is, its unit dropped; None where it is anything else.

    Plain are integers, decimals, fractions, mixed numbers and powers of ten, with a sign, a
    currency, a percent or degree sign, a scale word and a base (``4210_5``).
    """
    if len(latex) > 2 * MAX_DIGITS:
        return None
    text = spelled_out(latex.strip().rstrip("."))
    text = _PERCENT.sub("%", text.replace("\\$", "").replace("\\%", "%"))
    unit = _UNIT.search(text)
    if unit is not None:
        text = text[: unit.start()]
    if LIST.search(text):
        return None
    text = _DEGREES.sub("", closed_up(text))
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
    digits = (part["whole"] or part["mixed"] or "0").replace(",", "") + part["decimals"]
    if not any(map(str.isdigit, digits)):
        return None
    value = Fraction(digits) * Fraction(10) ** exponent
    value += Fraction(int(part["top"] or 0), bottom)
    return PlainNumber(
        -value if part["sign"] == "-" else value,
        int(part["base"]) if part["base"] else None,
        bool(part["percent"]),
        len(part["decimals"]) - 1 - exponent if part["decimals"] else None,
        "" if unit is None else _unit(unit[0]),
    )


def equal_numbers(found: PlainNumber, wanted: PlainNumber) -> bool:
    """Whether two numbers are equal.

    50% is both 50 and 1/2. A base that is left out is that of the question, and so is a unit, or
    one in other words; the same one with other signs (``cm^3`` for ``cm^2``) is another unit. A
    decimal is equal to a fraction without a finite one if it is that fraction to its last place:
    see :func:`is_rounded`.
    """
    if None not in (found.base, wanted.base) and found.base != wanted.base:
        return False
    if found.unit != wanted.unit and _letters(found.unit) == _letters(wanted.unit):
        return False
    shifts = {0}
    if found.percent != wanted.percent:
        shifts.add(-2 if found.percent else 2)
    for shift in shifts:
        value = found.value * Fraction(10) ** shift
        if value == wanted.value:
            return True
        if found.places is not None and wanted.places is None:
            if is_rounded(value, found.places - shift, wanted.value):
                return True
        elif (
            found.places is None
            and wanted.places is not None
            and is_rounded(wanted.value, wanted.places, value)
        ):
            return True
    return False


def _unit(written: str) -> str:
    """A unit without spaces and braces, ``*`` for its commands (``\\cdot``)."""
    return re.sub(r"[\s{}.]", "", re.sub(r"\\[a-zA-Z]+", "*", re.sub(TEXT, "", written)))


def _letters(unit: str) -> str:
    return "".join(filter(str.isalpha, unit))


def is_rounded(decimal: Fraction, places: int, value: Fraction) -> bool:
    """Whether ``decimal`` is ``value``, which has no finite decimal form, rounded or cut off.

    It needs six places and six digits: 0.333333 is 1/3, and neither 0.33 nor 0.0 is.
    """
    digits = decimal * 10**places if places >= 6 else Fraction(0)
    if abs(digits) < 10**5 or not _is_endless(value):
        return False
    exact = value * 10**places
    return digits in (round(exact), int(exact))


def _is_endless(value: Fraction) -> bool:
    """Whether a fraction has no finite decimal form."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest != 1
