"""Graders read hostile text: right on ordinary answers, quick and silent on everything else."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pav.grading import kinds as grading
from pav.grading import math_worker
from pav.grading.kinds import grade_text, last_boxed, number_of, reference
from pav.tasks.base import Grade

MILLION = 1_000_000


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 9 * 2 = 18.\n#### 18", "18"),
        ("#### 18.", "18"),
        ("#### 18.0", "18"),
        ("#### 018.50", "18.5"),
        ("#### $1,234,567", "1234567"),
        ("#### -$3", "-3"),
        ("#### \u22123", "-3"),
        ("#### 75%", "75"),
        ("#### .5", "0.5"),
        ("#### -0.0", "0"),
        ("#### 1e3", "1000"),
        ("#### 18 eggs in 7 days", "18"),
        ("#### $\\boxed{18}$", "18"),
        # The last mark counts; a mark with nothing after it is no answer.
        ("#### 1. First\n#### 18", "18"),
        ("so 18\n####", None),
        ("", None),
        ("no number", None),
        # Without a mark: the box, else the last number.
        ("5 of them: \\boxed{\\$1{,}200} in 3 days", "1200"),
        ("\\boxed{x} is not 3", None),
        ("It is 7 or 8.", "8"),
        ("16-3", "3"),
        ("the list 1,2,3", "3"),
        # Fractions are no decimal numbers, and never read as their numerator.
        ("#### 1/2", None),
        ("#### \\frac{1}{2}", None),
    ],
)
def test_number_reads_the_answer(text: str, answer: str | None) -> None:
    assert number_of(text) == answer
    assert grade_text("number", text, answer or "18") == Grade(answer, answer is not None)


def test_numbers_are_compared_exactly() -> None:
    long = "1234567890123456789012345678901234567890"
    assert grade_text("number", f"#### {long}", long).correct
    assert not grade_text("number", f"#### {long[:-1]}1", long).correct
    assert not grade_text("number", "#### 18.0000000000000000000000000000001", "18").correct


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**20), max_value=10**20))
def test_every_decimal_number_is_read_back(value: Decimal) -> None:
    answer = number_of(f"#### {value:f}")
    assert answer is not None
    assert Decimal(answer) == value
    # However it is written, equal numbers give the same answer, which majority votes count.
    assert number_of(f"is {value:,f}") == answer


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed {2}", "2"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{}", ""),
        ("} \\boxed{a} }", "a"),
        ("boxed{1}", None),
    ],
)
def test_last_balanced_box_is_found(text: str, inner: str | None) -> None:
    assert last_boxed(text) == inner


@pytest.mark.parametrize(
    ("written", "gold"),
    [
        ("\\dfrac12", "\\frac{1}{2}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("x = 5\\text{ cm}", "x=5cm"),
        ("90^\\circ", "90"),
        ("1{,}000.0", "1000"),
        ("50\\%", "50"),
    ],
)
def test_boxed_answers_are_equal_up_to_notation(written: str, gold: str) -> None:
    wanted = reference("boxed", gold)
    assert grade_text("boxed", f"Thus $\\boxed{{{written}}}$.", wanted).correct
    assert not grade_text("boxed", "Thus $\\boxed{no}$.", wanted).correct
    assert grade_text("boxed", written, wanted) == Grade(None, False)


def test_exact_compares_the_last_line() -> None:
    assert grade_text("exact", "because\n  Paris \n\n", "Paris") == Grade("Paris", True)
    assert grade_text("exact", "Paris\nLondon", "Paris") == Grade("London", False)
    assert grade_text("exact", " \n", "Paris") == Grade(None, False)


def test_none_grades_nothing() -> None:
    assert grade_text("none", "#### 18", "18") == Grade(None, False)


def test_references_give_their_answer_in_each_notation() -> None:
    assert reference("number", "16 - 3 - 4 = <<16-3-4=9>>9\n#### 9") == "9"
    assert reference("math", "We get $\\boxed{p - q}$.") == "p - q"
    assert reference("math", "p - q") == "p - q"
    assert reference("exact", "so\nParis") == "Paris"
    assert reference("none", "A long proof.\nDone.") == "A long proof.\nDone."
    assert reference("number", "none at all") is None
    assert reference("boxed", " ") is None


PIECES = st.sampled_from(
    ["####", "\\boxed{", "{", "}", "\\", "\\frac{", "\\text{", "1", ",000", ".", "-", "\u2212", "$"]
    + ["%", "e9", "e999999999", "/", " ", "\n", "\u0663", "\U0001d7d9", "\x00", "nan", "inf", "_"]
)


@given(st.text() | st.lists(PIECES).map("".join), st.none() | st.text())
@settings(deadline=None)
def test_no_text_makes_a_grader_raise(text: str, gold: str | None) -> None:
    for grader in ("number", "boxed", "exact", "none"):
        grade = grade_text(grader, text, gold)
        assert grade.answer is not None or not grade.correct
        reference(grader, text)


@pytest.mark.parametrize(
    "text",
    [
        "#### " + "1" * MILLION,
        "#### 1" + ",111" * (MILLION // 4),
        "#### 1e999999999",
        "#### 1e-999999999",
        "{" * 100_000,
        "\\boxed{" * 100_000,
        "\\boxed{" * 100_000 + "1" + "}" * 100_000,
        "\\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
        "\\boxed " * 100_000,
        "\\frac{" * 100_000,
        "\\boxed{" + "\\text{" * 100_000 + "}",
        "####" * (MILLION // 4),
        "-" * MILLION,
        "1/" * (MILLION // 2),
        "1e" * (MILLION // 2),
        " \n" * (MILLION // 2),
        "\\" * (MILLION + 1),
    ],
    ids=lambda text: text[:12],
)
def test_hostile_text_is_wrong_and_takes_linear_time(text: str) -> None:
    # Anything worse than linear would not end on a million characters.
    for grader in ("number", "boxed", "exact"):
        grade = grade_text(grader, text, "18")
        assert not grade.correct
        assert len(grade.answer or "") <= grading.MAX_ANSWER


@pytest.fixture
def math() -> Iterator[None]:
    """Grading by math-verify with no answers remembered from other tests."""
    math_worker.compare.cache_clear()
    yield
    math_worker.compare.cache_clear()


@pytest.mark.usefixtures("math")
def test_math_compares_what_expressions_mean() -> None:
    for text, gold in [
        ("\\boxed{0.5}", "\\frac{1}{2}"),
        ("so it is $2x+2$.", "2(x+1)"),
        ("\\boxed{\\left(3, \\frac{\\pi}{2}\\right)}", "(3,\\frac{\\pi}{2})"),
        ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}"),
    ]:
        assert grade_text("math", text, gold).correct, text
    assert not grade_text("math", "\\boxed{2x+3}", "2(x+1)").correct
    assert grade_text("math", "I do not know.", "7") == Grade(None, False)
    half = grade_text("math", "\\boxed{\\frac12}", "1")
    assert half == Grade(grade_text("math", "\\boxed{0.5}", "1").answer, False)


@pytest.mark.usefixtures("math")
def test_math_that_cannot_be_computed_is_wrong_and_the_next_answer_is_graded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(math_worker, "SECONDS", 1.0)
    for hostile in ["9^{9^{9^{9}}}", "(10^{9})!", "(" * 450 + ")" * 450]:
        assert not grade_text("math", f"\\boxed{{{hostile}}}", "7").correct
    monkeypatch.undo()
    assert grade_text("math", "\\boxed{7+x}", "x+7") == Grade("x + 7", True)


@pytest.mark.usefixtures("math")
def test_math_survives_the_death_of_its_process() -> None:
    assert grade_text("math", "\\boxed{x+7}", "7+x").correct
    worker = math_worker.workers[os.getpid()]
    worker.process.kill()
    worker.process.wait()
    assert grade_text("math", "\\boxed{x+8}", "8+x").correct


@pytest.mark.usefixtures("math")
def test_math_takes_any_text() -> None:
    for text in ["", "\x00", "\ud800", "\n", "\\boxed{" * 1000, "1" * MILLION, "\\boxed{\\sqrt[}"]:
        assert not grade_text("math", text, "18").correct
    assert not grade_text("math", "\\boxed{7}", None).correct


def test_script_without_main_guard_can_grade_math(tmp_path: Path) -> None:
    """A worker made by multiprocessing would run the script, and load its models, a second time."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pav.grading.kinds import grade_text\n"
        "print('start')\n"
        "print(grade_text('math', '\\\\boxed{1+x}', 'x+1').correct)\n"
    )
    root = str(Path(grading.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        check=False,
    )
    assert done.stdout.decode().split() == ["start", "True"], done.stderr.decode()


@pytest.mark.usefixtures("math")
def test_math_works_under_a_memory_limit() -> None:
    grade_text("math", "\\boxed{x+7}", "7+x")
    worker = math_worker.workers[os.getpid()]
    limit, _ = resource.prlimit(worker.process.pid, resource.RLIMIT_AS)
    assert limit == math_worker.MEMORY
