"""A reference is equal to itself, and to nothing that differs by a digit, sign or bound."""

from __future__ import annotations

import gzip
import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pav.grading.answer_forms import clock
from pav.grading.kinds import grade_text, number_of, reference
from pav.grading.numbers import equal_numbers, is_rounded, plain_number
from tests.pav.mutations import mutated

DATA = Path(__file__).parent / "data"
MATH500 = Path(__file__).parents[3] / "shared" / "data" / "math500.jsonl.gz"
CASES = [json.loads(line) for line in (DATA / "grading_cases.jsonl").read_text().splitlines()]
# Changes that change no meaning.
EQUAL = [
    ("0", "-0"),
    ("0 < r < 1", "-0 < r < 1"),
    # The second set alone bounds the first.
    ("(-\\infty, 4) \\cap [1, 9)", "(-0, 4) \\cap [1, 9)"),
    ("(-\\infty, 4) \\cap [1, 9)", "(-\\infty, 4) \\cap [1, 9]"),
]
# Sets, intervals, equations, tuples, units, matrices, functions, what no parser reads.
HARD = (DATA / "hard_golds.txt").read_text().splitlines()


def right(gold: str, answer: str) -> bool:
    return grade_text("math", f"\\boxed{{{answer}}}", reference("math", gold)).correct


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['gold']} | {case['prediction']}")
def test_kinds_of_answers_are_graded_right(case: dict[str, str]) -> None:
    gold = reference(case["grader"], case["gold"])  # type: ignore[arg-type]
    assert grade_text(case["grader"], case["prediction"], gold).correct is case["right"]  # type: ignore[arg-type]
    # The reference itself, whatever its kind.
    mark = "#### " if case["grader"] == "number" else ""
    itself = case["gold"] if "boxed" in case["gold"] else f"\\boxed{{{case['gold']}}}"
    assert grade_text(case["grader"], mark + itself, gold).correct  # type: ignore[arg-type]


def accepted(golds: list[str]) -> tuple[list[tuple[str, str]], int]:
    changes = [(gold, other) for gold in golds for other in mutated(gold)]
    found = [(gold, other) for gold, other in changes if right(gold, other)]
    return [change for change in found if change not in EQUAL], len(changes)


def test_hard_references_are_equal_to_themselves_and_to_no_change_of_them() -> None:
    assert [gold for gold in HARD if not right(gold, gold)] == []
    found, total = accepted(HARD)
    assert total > 1000
    assert found == []


@pytest.mark.skipif(not MATH500.exists(), reason="needs MATH-500 in ../shared/data")
def test_math500_references_are_equal_to_no_change_of_them() -> None:
    with gzip.open(MATH500) as lines:
        golds = sorted({json.loads(line)["answer"] for line in lines})
    found, total = accepted(golds)
    assert total > 1500
    assert found == []


# -- numbers ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1000, 10**12), st.sampled_from([" ", "\\,", "~", "\u202f", "\\ "]))
def test_digits_in_groups_are_one_number(value: int, space: str) -> None:
    written = f"{value:,}".replace(",", space)
    assert right(str(value), written)
    first, *_, last = written.split(space)
    assert not right(first, written) and not right(last, written)
    if space in " \u202f":
        assert number_of(f"#### {written}") == str(value)
        assert number_of(f"#### {first} {last}0") is None


@settings(deadline=None)
@given(st.integers(1, 999), st.integers(1, 99), st.integers(2, 100))
def test_mixed_numbers_are_sums(whole: int, top: int, bottom: int) -> None:
    value = whole + Fraction(top, bottom)
    for written in (f"{whole} {top}/{bottom}", f"{whole}\\frac{{{top}}}{{{bottom}}}"):
        assert right(f"\\frac{{{value.numerator}}}{{{value.denominator}}}", written)
        assert not right(f"\\frac{{{whole * top}}}{{{bottom}}}", written) or value == Fraction(
            whole * top, bottom
        )
    assert number_of(f"#### {whole} {top}/{bottom}") is None


@settings(deadline=None)
@given(st.integers(0, 99), st.from_regex(r"\A[0-9]{0,4}\Z"), st.from_regex(r"\A[0-9]{1,6}\Z"))
def test_repeating_decimals_are_exact(whole: int, start: str, repeated: str) -> None:
    number = plain_number(f"{whole}.{start}\\overline{{{repeated}}}")
    tail = Fraction(int(repeated), 10 ** len(repeated) - 1) + int(start or 0)
    assert number is not None and number.value == whole + tail / 10 ** len(start)
    cut = plain_number(f"{whole}.{start}{repeated}{repeated}")
    assert cut is not None
    assert number.value == cut.value or len(start + 2 * repeated) >= 6 or not equal_numbers(
        cut, number
    )  # fmt: skip


@settings(deadline=None)
@given(
    st.decimals(min_value=0, max_value=10**6, places=3),
    st.sampled_from([("hundred", 2), ("thousand", 3), ("million", 6), ("billion", 9)]),
)
def test_scale_words_are_factors(value: object, word: tuple[str, int]) -> None:
    name, power = word
    exact = Fraction(str(value)) * 10**power
    dollars = f"\\${value} \\text{{ {name} dollars}}"
    for written in (f"{value} {name}", dollars, f"{value}\\text{{ {name}}}"):
        number = plain_number(written)
        assert number is not None and number.value == exact
    # GSM8K asks for numbers of millions.
    assert Fraction(number_of(f"#### {value} {name}") or "x") == Fraction(str(value))


@settings(deadline=None)
@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=10**5), st.integers(0, 12))
def test_decimal_is_an_endless_fraction_only_to_its_last_place(
    value: Fraction, places: int
) -> None:
    rounded = Fraction(round(value * 10**places), 10**places)
    endless = any(value.denominator % p == 0 for p in range(3, 400, 2) if p % 5) or (
        10**30 % value.denominator != 0
    )
    enough = places >= 6 and abs(rounded) * 10**places >= 10**5
    assert is_rounded(rounded, places, value) == (endless and enough)
    for step in (-2, 2):
        assert not is_rounded(rounded + Fraction(step, 10**places), places, value)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 59), st.integers(1, 12), st.integers(0, 59))
def test_times_of_day_are_equal_only_to_themselves(h: int, m: int, hour: int, minute: int) -> None:
    same = (h, m) == (hour, minute)
    assert right(f"{h}:{m:02d} \\text{{ a.m.}}", f"\\text{{{hour}:{minute:02d} AM}}") == same
    assert not right(f"{h}:{m:02d} \\text{{ a.m.}}", f"{h}:{m:02d} \\text{{ p.m.}}")
    afternoon = clock(f"{h % 12 + 12}:{m:02d}")
    assert afternoon is not None and afternoon.equals(clock(f"{h}:{m:02d} p.m.") or afternoon)
    assert right(
        f"{h}:{m:02d}", f"{h}:{m:02d} \\text{{ p.m.}}"
    )  # what is left out is the question's


# -- what may be written differently, and what must not be taken apart -----------------------------


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("\\{x \\mid x < 3\\}", "(-\\infty, 3)"),
        ("[-2, 1)", "\\{x | -2 \\le x < 1\\}"),
        ("\\{x \\mid x \\leq 3\\}", "\\{ x : x \\le 3 \\}"),
        ("1, 3, 5, \\ldots, 99", "1,3,5,\\dots,99"),
        ("30 \\mathrm{mph}, 40 \\mathrm{mph}", "40, 30"),
        ("3 \\text{ hours } 40 \\text{ minutes}", "3 hrs and 40 min"),
        ("15 \\text{ cm}^2", "15 cm^2"),
        ("23", "\\text{23 students}"),
        ("x^2+4x+20=0", "2x^2 = -8x - 40"),
        ("y = 2x + 3", "2x - y + 3 = 0"),
        ("2x + 3y \\ge 6", "-4x - 6y \\le -12"),
        ("f(1)=3, f(2)=4", "f(2)=4, f(1)=3"),
        ("x = 1, x = 4", "x = 4 \\text{ or } x = 1"),
        ("x = \\pm 3", "3, -3"),
        ("x < -2 \\text{ or } x > 2", "(-\\infty,-2) \\cup (2,\\infty)"),
        ("\\frac12+\\frac{\\sqrt3}{2}i", "e^{i\\pi/3}"),
        ("\\frac{1}{2^{20}}", "2^{-20}"),
        ("0.1\\overline{6}", "\\frac16"),
        ("\\text{(C)}", "C"),
        ("\\text{E) } 5", "E"),
        ("16:30", "4:30 \\text{ p.m.}"),
        ("2:3:5", "4:6:10"),
        ("3:4", "\\frac34"),
        ("1,-2", "1} and \\boxed{-2"),
        ("\\sqrt{5+2\\sqrt6}", "\\sqrt2+\\sqrt3"),
    ],
)
def test_other_spellings_are_right(gold: str, answer: str) -> None:
    assert right(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("15 \\text{ cm}^2", "15 \\text{ cm}^3"),
        ("0", "x^2-4=0"),
        ("\\emptyset", "x^2+2=0"),
        ("x^2+1>0", "x^2+2>0"),
        ("x^2 = 4", "\\{2, -2\\}"),
        ("60", "3 \\text{ hours } 20 \\text{ minutes}"),
        ("4 \\text{ p.m.}", "4 \\text{ a.m.}"),
        ("75", "45^\\circ 30'"),
        ("2:3:5", "4:6:5"),
        ("A", "(A) and (C)"),
        ("\\text{E) } 5", "\\text{E) } 6"),
        ("2^{100}-1", "2^{100}-2"),
        ("x", "\\sqrt{x^2}"),
        ("3,-3", "3} is not {-3"),
        ("3", "3,-3"),
        ("\\frac{1}{2^{99}}", "0"),
        ("\\frac13", "0.333334"),
    ],
)
def test_other_meanings_are_wrong(gold: str, answer: str) -> None:
    assert not right(gold, answer)


def test_boxes_of_one_answer_belong_together_and_others_do_not() -> None:
    first = "First $r = \\boxed{5}$. So the area is $\\boxed{25\\pi}$."
    assert grade_text("math", first, "25\\pi").correct
    assert not grade_text("math", first, "5").correct
    assert grade_text("math", first, "25\\pi").answer == "25*pi"
    cases = "If $a>0$, it is $\\boxed{3}$. Otherwise, as we have seen above, it is $\\boxed{-3}$."
    assert reference("math", cases) == "3, -3"
    assert grade_text("math", cases, "3,-3").correct
    assert grade_text("math", "$x=\\boxed{3}$ or $x=\\boxed{-3}$", "3,-3").correct
    assert reference("math", "\\boxed{2}. Another way: \\boxed{2}") == "2"
    assert reference("boxed", "\\boxed{3} or \\boxed{-3}") == "3,-3"
    assert grade_text("boxed", "\\boxed{3} or $\\boxed{-3}$", "3,-3").correct
    assert grade_text("math", "\\boxed{\\text{so } \\boxed{7}}", "7").correct


def test_a_number_is_not_taken_out_of_a_formula_at_the_end_of_a_text() -> None:
    assert grade_text("math", "so it is $2x+2$.", "2(x+1)").correct
    assert not grade_text("math", "so it is $E_1 + 4$.", "4").correct
    assert not grade_text("math", "so it is $\\{x \\mid x > 3\\}$.", "3").correct
    assert grade_text("math", "so the answer is 4.", "4").correct


def test_different_equations_are_different_votes() -> None:
    golds = ["x^2+1=0", "x^2+2=0", "x^2+4x+20=0", "x^2-4x+20=0", "\\log_4 8=\\frac32"]
    votes = {grade_text("math", f"\\boxed{{{g}}}", "7").answer for g in golds}
    assert len(votes) == len(golds)


def test_mutations_change_every_kind_of_thing() -> None:
    """The test of the tests: a generator that makes nothing would accept nothing."""
    changes = set(mutated("[-2, \\frac{3}{4}) \\cup \\{x \\le 5\\}"))
    for wanted in (
        "(-2, \\frac{3}{4}) \\cup \\{x \\le 5\\}",
        "[-2, \\frac{3}{4}] \\cup \\{x \\le 5\\}",
        "[+2, \\frac{3}{4}) \\cup \\{x \\le 5\\}",
        "[-2, \\frac{4}{4}) \\cup \\{x \\le 5\\}",
        "[-2, \\frac{3}{4}) \\cap  \\{x \\le 5\\}",
        "[-2, \\frac{3}{4}) \\cup \\{x \\ge  5\\}",
    ):
        assert wanted in changes
