"""Answers that are no algebra: choices, times of day and quantities of several units."""

from __future__ import annotations

import re
from typing import NamedTuple

from pav.grading.numbers import SIGNS, TEXT, UNIT, PlainNumber, equal_numbers, plain_number

_TEXT = re.compile(rf"{TEXT}\{{([^{{}}]*)\}}")
_SPACE = re.compile(r"\\[,;:! ]|~|\$|\s+|\\q?quad(?![a-zA-Z])")
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s*:?\s*)?"
    r"(?:\((?P<a>[A-J])\)|(?P<b>[A-J])(?:[).:](?=[\s\\]|\Z)|\Z))\s*(?P<content>.*)",
    re.DOTALL | re.IGNORECASE,
)
# "(A) and (C)", "(A), (C)", "(A)+1"
_GOES_ON = re.compile(r"and\b|or\b|[,;&=+*/^_<>)|]")
_CLOCK = re.compile(
    r"(?P<h>[01]?[0-9]|2[0-4])(?::(?P<m>[0-5][0-9])(?::(?P<s>[0-5][0-9]))?)?(?P<half>am|pm)?"
)
_AMOUNT = (
    r"[-+]?(?:\\\$)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+|[0-9]*\\[dt]?frac\{[0-9]+\}\{[0-9]+\})"
)
_ANGLE = r"\^\{?\\circ\}?|\N{DEGREE SIGN}|'+|\^\{?\\prime\}?"
_QUANTITY = re.compile(rf"\s*(?P<amount>{_AMOUNT})\s*(?P<unit>{UNIT}|{_ANGLE})?")
_JOINED = re.compile(rf"\s*(?:,|and\b|{TEXT}\{{\s*and\s*\}})?\s*")
_SAME_UNIT = {"hr": "hour", "h": "hour", "min": "minute", "sec": "second", "ft": "foot"}
_SAME_UNIT |= {"feet": "foot", "in": "inch", "inche": "inch", "lb": "pound", "oz": "ounce"}


class Choice(NamedTuple):
    """One of several given answers; ``content`` is what it says, where that was repeated."""

    letter: str
    content: str = ""

    def __str__(self) -> str:
        return self.letter.lower()

    def equals(self, other: Choice) -> bool:
        """The letter decides; what both of them quote must not contradict it."""
        if self.letter != other.letter:
            return False
        mine, its = (_SPACE.sub("", c) for c in (self.content, other.content))
        return not mine or not its or mine == its


class Clock(NamedTuple):
    """A time of day; ``half`` is ``am``, ``pm`` or empty."""

    minutes: int
    seconds: int
    half: str
    could_be_ratio: bool

    def __str__(self) -> str:
        seconds = f":{self.seconds:02d}" * bool(self.seconds)
        return f"{self.minutes // 60}:{self.minutes % 60:02d}{seconds}{self.half}"

    def equals(self, other: Clock) -> bool:
        """Half a day that one of them leaves out is that of the question."""
        if self.seconds != other.seconds or (self.half and other.half and self.half != other.half):
            return False
        return bool({self.minutes, self._of_day} & {other.minutes, other._of_day})

    @property
    def _of_day(self) -> int:
        """Minutes since midnight, where the half of the day is known."""
        if not self.half or self.minutes >= 13 * 60:
            return self.minutes
        return self.minutes % 720 + 720 * (self.half == "pm")


class Quantities(NamedTuple):
    """Numbers with different units that are one answer (``3 hours 40 minutes``)."""

    amounts: tuple[PlainNumber, ...]
    units: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(f"{a} {u}".strip() for a, u in zip(self.amounts, self.units, strict=True))

    def equals(self, other: Quantities) -> bool:
        """The same numbers of the same units, in any order."""
        if len(self.units) != len(other.units):
            return False
        mine, its = dict(zip(self.units, self.amounts)), dict(zip(other.units, other.amounts))  # noqa: B905
        return mine.keys() == its.keys() and all(equal_numbers(mine[u], its[u]) for u in mine)


def choice(latex: str) -> Choice | None:
    """The choice that an answer names: ``E``, ``(E)``, ``E) 5``, ``Option E``."""
    text = _SPACE.sub(" ", _TEXT.sub(r"\1", latex)).strip().rstrip(".").strip()
    match = _CHOICE.fullmatch(text)
    if match is None:
        return None
    letter, content = match["a"] or match["b"], match["content"].strip()
    if not letter.isupper() or _GOES_ON.match(content):
        return None
    return Choice(letter, content)


def clock(latex: str) -> Clock | None:
    """The time of day that an answer is: ``7:30 a.m.``, ``10:20``, ``4 p.m.``."""
    text = _SPACE.sub("", _TEXT.sub(r"\1", latex)).lower().replace(".", "")
    match = _CLOCK.fullmatch(text)
    if match is None or not (match["m"] or match["half"]):
        return None
    hours, minutes, half = int(match["h"]), int(match["m"] or 0), match["half"] or ""
    could_be_ratio = not half and not (match["m"] or "0").startswith("0")
    return Clock(60 * hours + minutes, int(match["s"] or 0), half, could_be_ratio)


def quantities(latex: str) -> Quantities | None:
    """Two and more numbers with a unit each, all different; the last may go without."""
    text = latex.translate(SIGNS).replace("\\ ", " ").replace("\\,", " ").replace("~", " ").strip()
    amounts: list[PlainNumber] = []
    units: list[str] = []
    at = 0
    while at < len(text):
        match = _QUANTITY.match(text, at)
        number = plain_number(match["amount"]) if match else None
        if match is None or number is None or (units and not units[-1]):
            return None
        amounts.append(number)
        units.append(_unit_name(match["unit"] or ""))
        gap = _JOINED.match(text, match.end())
        at = gap.end() if gap else match.end()
    if len(amounts) < 2 or len(set(units)) < len(units):
        return None
    return Quantities(tuple(amounts), tuple(units))


def _unit_name(written: str) -> str:
    text = re.sub(r"[\s{}.]", "", _TEXT.sub(r"\1", written)).lower()
    text = re.sub(r"(?<=[a-z])(?:,?and)$", "", text)
    name = text.removesuffix("s") if text.isalpha() and len(text) > 2 else text
    return _SAME_UNIT.get(name, name)
