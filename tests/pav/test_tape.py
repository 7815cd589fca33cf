"""The calculator tape: right solutions are right, wrong lines are named, splits do not meet."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pav.tasks.base import Problem, Split, problem_id, split_of
from pav.tasks.tape import Tape, apply, parse, tape_tokenizer, value_of

TAPE = Tape()
TOKENIZER = tape_tokenizer()
# 37+8=45, 45*3=35 (135 on a display of two digits), 35-15=20.
PROBLEM = Problem("p", "37+8*3-15", "20")
OPERATIONS = st.sampled_from("+-").flatmap(
    lambda op: st.tuples(st.just(op), st.integers(2, 29))
) | st.tuples(st.just("*"), st.integers(2, 9))


def lines(text: str) -> list[str]:
    """Steps as the step rule cuts them: each but the last with its newline."""
    return text.splitlines(keepends=True)


@given(st.integers(2, 99), st.lists(OPERATIONS, min_size=1, max_size=12))
def test_value_is_that_of_python_arithmetic_from_left_to_right(
    start: int, operations: list[tuple[str, int]]
) -> None:
    question = str(start) + "".join(f"{op}{y}" for op, y in operations)
    assert parse(question) == (start, operations)
    value = start
    for op, y in operations:
        value = {"+": value + y, "-": value - y, "*": value * y}[op] % 100
    assert value_of(question) == value


@given(st.integers(0, 2**32), st.integers(0, 9))
def test_every_generated_solution_is_right_and_has_no_slip(seed: int, skip: int) -> None:
    question, solution = next(islice(TAPE.solutions(seed), skip, None))
    problem = Problem(problem_id(question), question, str(value_of(question)))
    assert TAPE.grade(solution, problem).correct
    assert TAPE.slips(lines(solution), problem) == [None] * len(lines(solution))


def test_generated_solutions_are_of_the_train_split_and_of_all_lengths() -> None:
    drawn = list(islice(TAPE.solutions(0), 2000))
    assert {split_of(problem_id(question)) for question, _ in drawn} == {"train"}
    lengths = Counter(len(parse(question)[1]) for question, _ in drawn)
    assert sorted(lengths) == list(range(TAPE.sft_ops[0], TAPE.sft_ops[1] + 1))
    kinds = Counter(
        "restatement" if line.startswith("=") else "answer" if line[0] == "A"
        else "short cut" if sum(map(line.count, "+-*")) == 2 else "plain"
        for _, solution in drawn
        for line in solution.split("\n")
    )  # fmt: skip
    steps = kinds.total() - kinds["answer"]
    assert kinds["answer"] == len(drawn)
    assert 0.08 < kinds["restatement"] / steps < 0.12
    # A little under 15%: the last operation has none to be taken with.
    assert 0.10 < kinds["short cut"] / steps < 0.15


def test_streams_of_solutions_depend_on_the_seed_alone() -> None:
    def first(seed: int) -> list[tuple[str, str]]:
        return list(islice(TAPE.solutions(seed), 20))

    assert first(1) == first(1) != first(2)


@pytest.mark.parametrize(
    ("solution", "kinds"),
    [
        ("37+8=45\n45*3=35\n35-15=20\nA20", [None, None, None, None]),
        ("=37\n37+8*3=35\n=35\n35-15=20\nA20", [None, None, None, None, None]),
        ("37+8=46\n", ["result +-"]),
        ("37+8=45\n45*3=34\n", [None, "result *"]),
        ("37+8=45\n45*3=35\n35-15=19\n", [None, None, "result +-"]),
        ("37+8*3=36\n", ["short cut"]),
        ("37+8=45\n45*3-15=21\n", [None, "short cut"]),
        ("38+8=46\n", ["copy"]),
        ("37+8=45\n54*3=62\n", [None, "copy"]),
        ("37+9=46\n", ["operation"]),
        ("37-8=29\n", ["operation"]),
        # A key left out, one pressed twice, one more than there are.
        ("37*3=11\n", ["operation"]),
        ("37+8=45\n45+8=53\n", [None, "operation"]),
        ("37+8=45\n45*3=35\n35-15=20\n20+1=21\n", [None, None, None, "operation"]),
        ("37+8=45\n45*3=35\n35-15+1=21\n", [None, None, "operation"]),
        ("=36\n", ["restatement"]),
        ("37+8=45\n=37\n", [None, "restatement"]),
        ("A20", ["answer"]),
        ("37+8=45\nA45", [None, "answer"]),
        ("37+8*3=35\n35-15=20\nA21", [None, None, "answer"]),
        ("37+8=145\n", ["form"]),
        ("37+8\n", ["form"]),
        ("37+8*3-15=20\n", ["form"]),
        ("37 + 8=45\n", ["form"]),
        ("\n", ["form"]),
        # What follows the first slip is of its kind, right or wrong.
        ("37+8=46\n46*3=38\n=99\nA20", ["result +-"] * 4),
    ],
)
def test_first_slip_is_named(solution: str, kinds: list[str | None]) -> None:
    assert TAPE.slips(lines(solution), PROBLEM) == kinds


def test_step_that_opens_with_blank_lines_is_read_without_them() -> None:
    assert TAPE.slips(["\n\n37+8=45\n", "\n45*3=35\n"], PROBLEM) == [None, None]


@pytest.mark.parametrize(
    ("text", "answer", "correct"),
    [
        ("A20", "20", True),
        ("anything\nA20", "20", True),
        ("A020", None, False),
        ("A20\n", None, False),
        ("A20 ", None, False),
        ("=20", None, False),
        ("A", None, False),
        ("A\u0662\u0660", None, False),
        ("A21", "21", False),
        ("A20\nA21", "21", False),
        ("", None, False),
    ],
)
def test_only_a_last_line_with_the_value_is_right(
    text: str, answer: str | None, correct: bool
) -> None:
    grade = TAPE.grade(text, PROBLEM)
    assert (grade.answer, grade.correct) == (answer, correct)


HOSTILE = st.text() | st.lists(
    st.sampled_from([*"0123456789+-*=A\n", "\u0663", "\x00", "\ud800", "%", "__import__('os')"])
).map("".join)


@given(HOSTILE)
@settings(deadline=None)
def test_no_text_makes_grading_raise(text: str) -> None:
    grade = TAPE.grade(text, PROBLEM)
    assert grade.correct == (grade.answer == PROBLEM.gold)
    kinds = TAPE.slips(lines(text), PROBLEM)
    assert len(kinds) == len(lines(text))


def test_a_million_characters_are_graded() -> None:
    for text in ("A" * 10**6, "A" + "1" * 10**6, "\n" * 10**6, "1+1=2\n" * 10**5 + "A20"):
        assert TAPE.grade(text, PROBLEM).correct == text.endswith("\nA20")


def problems(split: Split, count: int, task: Tape = TAPE) -> list[Problem]:
    return list(islice(task.problems(split), count))


def test_splits_are_disjoint_and_always_the_same() -> None:
    found = {split: problems(split, 400) for split in ("train", "validation", "test")}
    ids = {split: {p.id for p in part} for split, part in found.items()}
    for split, part in found.items():
        assert len(ids[split]) == 400
        assert all(p.id == problem_id(p.question) and split_of(p.id) == split for p in part)
        assert all(p.gold == str(value_of(p.question)) for p in part)
        assert problems(split, 50) == part[:50]
    assert not ids["train"] & ids["validation"]
    assert not ids["train"] & ids["test"]
    assert not ids["validation"] & ids["test"]


def test_splits_are_about_90_5_5() -> None:
    rng = random.Random(0)
    share = Counter(split_of(problem_id(str(rng.random()))) for _ in range(20_000))
    assert share["train"] / 20_000 == pytest.approx(0.90, abs=0.01)
    assert share["validation"] / 20_000 == pytest.approx(0.05, abs=0.006)
    assert share["test"] / 20_000 == pytest.approx(0.05, abs=0.006)


@pytest.mark.parametrize("n_ops", [3, 6, 8])
def test_n_ops_is_the_number_of_operations(n_ops: int) -> None:
    found = problems("test", 100, Tape(n_ops=n_ops))
    operations = [parse(p.question)[1] for p in found]
    assert {len(o) for o in operations} == {n_ops}
    kinds = Counter(op for o in operations for op, _ in o)
    assert kinds["*"] < kinds["+"]
    assert kinds["*"] < kinds["-"]
    assert all(2 <= y <= (9 if op == "*" else 29) for o in operations for op, y in o)
    assert all(2 <= parse(p.question)[0] <= 99 for p in found)


def test_problems_of_other_difficulty_are_another_task() -> None:
    assert Tape(n_ops=7).fingerprint != TAPE.fingerprint


@given(st.text(alphabet="0123456789+-*=A\n"))
def test_tokenizer_gives_a_token_per_character_and_every_text_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode(text) == [TOKENIZER.bos_token_id, *ids]
    assert TOKENIZER.decode([*ids, TOKENIZER.eos_token_id], skip_special_tokens=True) == text


def test_display_wraps_at_a_hundred_in_both_directions() -> None:
    assert [apply(99, "+", 2), apply(1, "-", 2), apply(50, "*", 9)] == [1, 99, 50]
