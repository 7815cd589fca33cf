"""A label run is stopped early where its first few hundred rollouts say so, and tells its time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.inspect.watch import (
    LOOKS,
    Doubtful,
    Watch,
    minutes_left,
    tokens_per_solution,
    watch_for,
)
from data_gen.strategies import Plan
from pav.labels.tables import Completion
from pav.tasks.jsonl import Jsonl
from pav.tasks.tape import Tape

RIGHT = Completion("k", "p", "base", 0, [], [1, 2], "7", True, False)
WRONG = replace(RIGHT, answer="8", correct=False)
NEUTRAL = replace(RIGHT, answer=None, correct=False)
CUT = replace(NEUTRAL, truncated=True)


@pytest.mark.parametrize(
    ("most", "others", "says"),
    [
        (CUT, RIGHT, "101 of 200 finished solutions and rollouts were cut by the length cap"),
        (NEUTRAL, RIGHT, "in 101 of 200 finished solutions and rollouts the grader of the task"),
        (WRONG, WRONG, "none of 200 finished solutions and rollouts is right"),
    ],
)
def test_run_stops_at_two_hundred_rollouts_that_are_mostly_no_use(
    most: Completion, others: Completion, says: str
) -> None:
    records = [most] * 101 + [others] * 99
    watch = Watch(stops=True)
    for record in records[:-1]:
        watch.see(record)
    with pytest.raises(Doubtful, match=says):
        watch.see(records[-1])
    # An earlier start's rollouts are as good a reason.
    with pytest.raises(Doubtful, match=says):
        Watch(stops=True).recall(records, ["base"])
    patient = Watch()
    for record in records:
        patient.see(record)
    assert patient.finished == 200 and says in patient.doubt()


def test_short_ones_that_finish_first_do_not_hide_what_is_cut_later() -> None:
    watch = Watch(stops=True)
    for _ in range(300):
        watch.see(RIGHT)
    with pytest.raises(Doubtful, match="500 of 800"):
        for _ in range(1000):
            watch.see(CUT)


def test_hard_but_sound_run_goes_on() -> None:
    watch = Watch(stops=True)
    for _ in range(LOOKS[-1]):
        for record in (RIGHT, CUT, WRONG, NEUTRAL):
            watch.see(record)
    assert watch.shares == "25% cut, 25% right"


def test_solutions_without_a_grader_are_not_missed_as_answers() -> None:
    ungraded = watch_for(Jsonl(data="x.jsonl", grader="none"), stops=True)
    for _ in range(LOOKS[-1]):
        ungraded.see(NEUTRAL)
    with pytest.raises(Doubtful, match="cut by the length cap"):
        for _ in range(2 * LOOKS[-1]):
            ungraded.see(CUT)
            ungraded.look()
    assert watch_for(Tape(), stops=True).graded


PLAN = Plan(("base", "prover"), n_mc=1)


def test_time_left_is_told_before_any_solution_has_finished() -> None:
    # 150 solutions in flight, 100 tokens each after a minute; at most 1000 tokens a solution.
    each = tokens_per_solution(Watch(), PLAN, tokens=15_000, room=1000)
    assert each == 1000 * (1 + 2 * 8)
    left = minutes_left(150, 0, 15_000, 60.0, each)
    assert left == pytest.approx((150 * each - 15_000) / 15_000)
    assert minutes_left(150, 0, 0, 60.0, each) is None


@given(
    solutions=st.integers(1, 10_000), share=st.floats(0, 1), rate=st.floats(1, 1e5),
    each=st.integers(1, 10_000),
)  # fmt: skip
def test_time_left_is_right_where_solutions_are_alike(
    solutions: int, share: float, rate: float, each: float
) -> None:
    done = int(share * solutions)
    tokens = done * each
    if not tokens:
        return
    left = minutes_left(solutions, done, tokens, tokens / rate, each)
    assert left == pytest.approx((solutions - done) * each / rate / 60, abs=1e-6)
