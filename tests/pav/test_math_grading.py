"""``math`` answers: equal when they mean the same, whatever the spelling, and not otherwise."""

from __future__ import annotations

import gzip
import json
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pav.grading import kinds as grading
from pav.grading import math_worker
from pav.grading.kinds import grade_text
from pav.grading.numbers import plain_number
from pav.grading.parser_internals import parse_in_two_stages
from pav.tasks.base import Grade

MATH500 = Path(__file__).parents[3] / "shared" / "data" / "math500.jsonl.gz"
needs_math500 = pytest.mark.skipif(not MATH500.exists(), reason="needs MATH-500 in ../shared/data")

# (reference answer, answer with the same meaning)
EQUIVALENT = [
    # numbers
    ("5", "5.0"),
    ("5", "+5"),
    ("-5", "\u22125"),
    ("-5", "\\text{-}5"),
    ("0", "-0"),
    ("1000", "1,000"),
    ("1000", "1{,}000"),
    ("10,\\!080", "10080"),
    ("58,500", "58500.00"),
    ("11,\\! 111,\\! 111,\\! 100", "11111111100"),
    (".0000672", "6.72\\times 10^{-5}"),
    ("300000", "3\\cdot10^5"),
    ("100000", "1e5"),
    ("1024", "2^{10}"),
    ("120", "5!"),
    ("10", "\\binom{5}{2}"),
    ("3", "\\log_2 8"),
    ("4210_{5}", "4210_5"),
    ("52_8", "52"),
    # fractions
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", ".5"),
    ("\\frac43", "\\dfrac{4}{3}"),
    ("\\frac 59", "5/9"),
    ("\\frac{270}7", "\\tfrac{270}{7}"),
    ("\\frac9{19}", "\\frac{18}{38}"),
    ("-\\frac{35}{9}", "\\frac{-35}{9}"),
    ("1\\frac{4}{5}", "1.8"),
    ("137 \\frac{1}{2}", "\\frac{275}{2}"),
    ("\\frac{1}{3}", "0.333333"),
    # units, currency, percent, degrees
    ("5.4 \\text{ cents}", "5.4"),
    ("864 \\mbox{ inches}^2", "864\\text{ in}^{2}"),
    ("15", "15\\mathrm{~cm}"),
    ("\\$18.90", "18.9"),
    ("\\$36", "36\\text{ dollars}"),
    ("\\$32,\\!348", "\\$32348.00"),
    ("50\\%", "50"),
    ("50\\%", "\\frac12"),
    ("90^\\circ", "90"),
    ("90^\\circ", "90\u00b0"),
    ("120", "120^{\\circ}"),
    # roots, constants, complex numbers
    ("11\\sqrt2", "11\\sqrt{2}"),
    ("3\\sqrt{13}", "\\sqrt{117}"),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
    ("2\\pi", "\\pi\\cdot2"),
    ("\\frac{20000}{\\pi}", "20000/\\pi"),
    ("6 - 5i", "-5i+6"),
    ("6 - 5i", "6-5\\cdot i"),
    # expressions and equations
    ("p - q", "-q+p"),
    ("2k+2", "2(k+1)"),
    ("(a+5)(b+2)", "ab+2a+5b+10"),
    ("\\frac{11+9a}{20}", "\\frac{9a+11}{20}"),
    ("\\cot x", "\\frac{\\cos x}{\\sin x}"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("y = 2x + 3", "y-2x=3"),
    ("5x - 7y + 11z + 4 = 0", "-5x+7y-11z-4=0"),
    # tuples, sets, intervals, matrices
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"),
    ("(6,31,-1)", "\\left(6, 31, -1\\right)"),
    ("3, 5, 7", "7,5,3"),
    ("1,-2", "\\{-2,1\\}"),
    ("1 \\pm \\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}"),
    ("(3,4]", "\\left(3,4\\right]"),
    ("(-\\infty, 0]", "(-\\infty,0.0]"),
    ("[-2,7]", "-2\\le x\\le7"),
    ("x \\in [-2,7]", "[-2,7]"),
    ("(0,9) \\cup (9,36)", "(9,36)\\cup(0,9)"),
    ("\\emptyset", "\\{\\}"),
    (
        "\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}",
        "\\begin{bmatrix}-\\frac13\\\\\\frac23\\end{bmatrix}",
    ),
    # words
    ("\\text{Evelyn}", "evelyn"),
    ("\\text{(C)}", "C"),
    ("\\text{ellipse}", "\\mathrm{ellipse}"),
]
# (reference answer, answer with another meaning)
DIFFERENT = [
    ("5", "-5"),
    ("5", "50"),
    ("5", "5.0000000001"),
    ("0", "0.0000001"),
    (".0000672", ".0000670"),
    ("1000", "1,001"),
    ("12", "1 2"),
    ("1234", "1, 234"),
    ("4210_{5}", "4210_6"),
    ("52_8", "42"),
    ("\\frac{1}{2}", "\\frac{2}{1}"),
    ("\\frac{1}{2}", "0.51"),
    ("\\frac{1}{3}", "0.33"),
    ("\\frac{1}{3}", "\\frac{1}{0}"),
    ("1\\frac{4}{5}", "\\frac{4}{5}"),
    ("50\\%", "5"),
    ("50\\%", "0.05"),
    ("\\sqrt{2}", "1.41"),
    ("3\\sqrt{13}", "13\\sqrt{3}"),
    ("2\\pi", "6.28"),
    ("6 - 5i", "6+5i"),
    ("p - q", "q-p"),
    ("2k+2", "2m+2"),
    ("x^2", "x^3"),
    ("y = 2x + 3", "y=2x-3"),
    ("(3, \\pi)", "(\\pi, 3)"),
    ("(6,31,-1)", "(6,31)"),
    ("3, 5, 7", "3,5"),
    ("3, 5, 7", "3,5,8"),
    ("(3,4]", "(3,4)"),
    ("(3,4]", "[3,4]"),
    ("(2,\\infty)", "(-\\infty,2)"),
    ("(0,9) \\cup (9,36)", "(0,36)"),
    ("[-2,7]", "-2<x<7"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
    ("\\infty", "-\\infty"),
    ("\\text{even}", "\\text{odd}"),
    ("\\text{(C)}", "\\text{(D)}"),
    ("7", ""),
    ("7", "\\text{seven or eight}"),
]


def without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make no two answers the same text."""
    monkeypatch.setattr(grading, "normalise", lambda latex: object())


@pytest.mark.parametrize(("gold", "answer"), EQUIVALENT)
def test_equivalent_answers_are_right(gold: str, answer: str) -> None:
    assert grade_text("math", f"Therefore $\\boxed{{{answer}}}$.", gold).correct


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers_are_wrong(gold: str, answer: str) -> None:
    assert not grade_text("math", f"Therefore $\\boxed{{{answer}}}$.", gold).correct


@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=1000))
def test_plain_numbers_are_exact_however_they_are_written(value: Fraction) -> None:
    top, bottom, sign = abs(value.numerator), value.denominator, "-" * (value < 0)
    whole, rest = divmod(top, bottom)
    written = [
        f"{sign}\\frac{{{top}}}{{{bottom}}}",
        f"{sign} {top} / {bottom}\\text{{ cm}}^2",
        f"\\${sign}{whole:,}\\tfrac{{{rest}}}{{{bottom}}}",
        f"{sign}\\dfrac{{{top * 7}}}{{{bottom * 7}}}^{{\\circ}}",
    ]
    if 10**9 % bottom == 0:
        written.append(f"{sign}{top * 10**9 // bottom}e-9")
        written.append(f"{sign}{whole:,}.{rest * 10**9 // bottom:09d}")
    for text in written:
        number = plain_number(text)
        assert number is not None and number.value == value, text
    assert grade_text("math", f"\\boxed{{{written[0]}}}", written[-1]) == Grade(str(value), True)


@example([",", "1", "/", "1"])
@given(st.text(max_size=30) | st.lists(st.sampled_from("12,./_^{}%e-\\ \n"), max_size=20))
def test_no_text_makes_the_reader_of_numbers_raise(text: str | list[str]) -> None:
    number = plain_number("".join(text))
    assert number is None or plain_number(str(number.value)) is not None


def test_equal_answers_are_one_vote() -> None:
    for spellings in [
        ("\\frac12", "0.5", "\\frac{2}{4}", "\\frac{\\sqrt{4}}{4}", "x = \\frac12"),
        ("\\frac{\\pi}{2}", "\\pi/2", "0.5\\pi"),
        ("(1.5, 2)", "\\left(\\frac{3}{2},2\\right)"),
    ]:
        votes = {grade_text("math", f"\\boxed{{{s}}}", "7").answer for s in spellings}
        assert len(votes) == 1, votes


def test_a_right_answer_is_no_other_vote_than_without_the_reference() -> None:
    """A vote must not be moved together by the reference answer."""
    for gold, answer in EQUIVALENT:
        known = grade_text("math", f"\\boxed{{{answer}}}", gold).answer
        if grading.normalise(answer) != grading.normalise(gold):
            assert known == grade_text("math", f"\\boxed{{{answer}}}", "12345").answer


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}",
        "{" * 100_000 + "}" * 100_000,
        "1" * 1_000_000,
        "1." + "1" * 900,
        "__import__('os').system('touch {made}')",
        "\\text{__import__('os').system('touch {made}')}",
        "eval(open('{made}','w'))",
    ],
    ids=lambda answer: answer[:20],
)
def test_hostile_answers_are_wrong_and_do_nothing(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(math_worker, "SECONDS", 1.0)
    made = tmp_path / "made"
    text = answer.replace("{made}", str(made))
    for solution in (f"\\boxed{{{text}}}", f"The answer is ${text}$", text):
        assert not grade_text("math", solution, "7").correct
    assert not made.exists()


def golds() -> list[str]:
    with gzip.open(MATH500) as lines:
        return [json.loads(line)["answer"] for line in lines]


def rewritten(gold: str) -> dict[str, str]:
    """Ways in which a model could write the answer ``gold``."""
    out = {"dollars": f"${gold}$", "full stop": f"{gold}."}
    fractions = re.sub(r"\\d?frac\s*(\d)\s*(\d)", r"\\dfrac{\1}{\2}", gold)
    out["dfrac"] = re.sub(r"\\d?frac\s*", r"\\dfrac", fractions)
    out["minus"] = gold.replace("-", "\u2212")
    if not re.fullmatch(r"[\\$\d,! ]+", gold):
        out["spacing"] = re.sub(r"([,+=])", r" \1\\; ", gold)
        out["tight"] = re.sub(r"(?<!\\)(?<![a-z])\s+", "", gold)
    out["left right"] = re.sub(
        r"^([(\[])(.*)([)\]])$", r"\\left\1\2\\right\3", re.sub(r"\\(left|right)", "", gold)
    )
    if re.fullmatch(r"-?\d+", gold):
        out |= {"decimal": gold + ".0", "unit": gold + "\\text{ units}", "equation": f"x = {gold}"}
        out |= {"comma": f"{int(gold):,}", "braces": f"{int(gold):,}".replace(",", "{,}")}
        out["fraction"] = f"\\frac{{{2 * int(gold)}}}{{2}}"
    fraction = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", gold)
    if fraction:
        sign, top, bottom = fraction[1], int(fraction[2]), int(fraction[3])
        out["slash"] = f"{sign}{top}/{bottom}"
        out["inside"] = f"\\frac{{{sign}{top}}}{{{bottom}}}"
        if 10**6 % bottom == 0:
            out["decimal"] = f"{sign}{top / bottom:.6f}"
    if gold.endswith("^\\circ"):
        bare = gold.removesuffix("^\\circ")
        out |= {"sign": bare + "\u00b0", "braces": bare + "^{\\circ}", "bare": bare}
        out["unit"] = bare + "\\text{ degrees}"
    if word := re.fullmatch(r"\\text\{\(?(\w+)\)?\}", gold):
        out |= {"word": word[1], "bold": f"\\textbf{{{word[1]}}}", "lower": word[1].lower()}
    if "pmatrix" in gold:
        out["brackets"] = gold.replace("pmatrix", "bmatrix")
    if re.fullmatch(r"[-\d]+(,\s*[-\d]+)+", gold) and not re.fullmatch(r"\d+,\d{3}", gold):
        out["set"] = f"\\{{{gold}\\}}"
        out["order"] = ", ".join(reversed(gold.split(",")))
    if re.search(r"\\sqrt\{\d\}", gold):
        out["short root"] = re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", gold)
    return out


@needs_math500
def test_every_math500_answer_is_equal_to_itself_without_comparing_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_text(monkeypatch)
    failures = [g for g in golds() if not grade_text("math", f"\\boxed{{{g}}}", g).correct]
    assert not failures


@needs_math500
def test_every_math500_answer_is_equal_to_itself_by_algebra_alone() -> None:
    failures = [
        g
        for g in golds()
        if not math_worker.compare(f"\\boxed{{{g}}}", g).get("correct")  # no plain numbers either
    ]
    assert not failures


@needs_math500
def test_rewritten_math500_answers_are_right_without_comparing_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_text(monkeypatch)
    failures = []
    for gold in golds():
        for way, text in rewritten(gold).items():
            if not grade_text("math", f"\\boxed{{{text}}}", gold).correct:
                failures.append(f"{gold!r} by {way}: {text!r}")
    share = 1 - len({f.split(" by ")[0] for f in failures}) / 500
    print(f"{share:.1%} of the answers in every rewritten form; failures:", *failures, sep="\n")
    assert share >= 0.99, failures


@needs_math500
def test_math500_answers_of_different_problems_are_different() -> None:
    answers = sorted({grading.normalise(g): g for g in golds()}.values())
    pairs = list(pairwise(answers))
    same = [(a, b) for a, b in pairs if grade_text("math", f"\\boxed{{{b}}}", a).correct]
    assert len(pairs) > 250
    assert same == [("15", "15\\mbox{ cm}^2")]


@needs_math500
def test_parsing_in_two_stages_changes_no_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    from latex2sympy2_extended import latex2sympy2
    from math_verify import parse

    texts = sorted({g for g in golds() if plain_number(g) is None})
    texts += [answer for pair in EQUIVALENT + DIFFERENT for answer in pair if answer][:60]

    def read() -> list[str]:
        return [repr(parse(f"\\boxed{{{t}}}", parsing_timeout=None)) for t in texts]

    plain = read()
    monkeypatch.setattr(latex2sympy2, "_Latex2Sympy", latex2sympy2._Latex2Sympy)
    parse_in_two_stages()
    assert read() == plain
