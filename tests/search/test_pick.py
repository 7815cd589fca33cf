"""The final pick: every rule, on hand-made and on random final sets."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pav.core.errors import UserError
from pav.verifier.pick import Candidate, Pick, check_pick, lowest_step, pick

# The rules that read values alone; ``pav`` reads a step score as well.
RULES: tuple[Pick, ...] = tuple(r for r in get_args(Pick) if r != "pav")

# Time is the machine's: it fails no test.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def candidate(
    answer: str | None, q: list[float], orm: float = 0.5, finished: bool = True
) -> Candidate:
    """A solution with a Q after step 0, 1, ... and one value of the ORM."""
    heads = {"q/base": q, "orm": [orm]}
    return Candidate([], [], heads, 0.0, finished, truncated=not finished, answer=answer)


def test_each_rule_picks_what_it_says() -> None:
    found = [
        candidate("1", [0.5, 0.3, 0.9], orm=0.2),  # best last step
        candidate("2", [0.1, 0.6, 0.7], orm=0.5),  # best worst step; step 0 is no step
        candidate("3", [0.5, 0.1, 0.2], orm=0.9),  # best by the ORM
        candidate("4", [0.5, 0.5, 0.5], orm=0.4),
        candidate("4", [0.5, 0.1, 0.6], orm=0.45),  # best of the most frequent and heaviest answer
    ]
    picked = {rule: pick(found, rule, "q/base") for rule in RULES}
    assert picked == {"last": 0, "min": 1, "orm": 2, "vote": 4, "orm_vote": 2, "majority": 3}


def test_answers_that_cannot_be_parsed_do_not_vote_together() -> None:
    found = [candidate(None, [0, 0.9]), candidate(None, [0, 0.9]), candidate("1", [0, 0.1])]
    assert [pick(found, rule, "q/base") for rule in ("vote", "orm_vote", "majority")] == [2, 2, 2]
    # Nothing parsable at all: the first finished solution, which is wrong anyway.
    assert pick(found[:2], "majority", "q/base") == 0


@pytest.mark.parametrize("rule", RULES)
def test_unfinished_candidates_are_never_picked(rule: Pick) -> None:
    best = candidate("1", [1.0, 1.0], orm=1.0, finished=False)
    assert pick([best, best, candidate("2", [0.0, 0.1], orm=0.1)], rule, "q/base") == 2
    assert pick([best, best], rule, "q/base") is None
    assert pick([], rule, "q/base") is None


@pytest.mark.parametrize("rule", RULES)
def test_ties_go_to_the_earlier_candidate(rule: Pick) -> None:
    same = [candidate("7", [0.5, 0.5]), candidate("8", [0.5, 0.5]), candidate("9", [0.5, 0.5])]
    assert pick(same, rule, "q/base") == 0
    assert pick([candidate("6", [0, 0], finished=False), *same], rule, "q/base") == 1


def test_pav_takes_the_best_lowest_step_score() -> None:
    # Q + A under one head: 2 Q - (Q before). Lowest steps: .1, .3, .2.
    found = [candidate("1", [0.5, 0.3, 0.9]), candidate("2", [0.5, 0.4, 0.6]),
             candidate("3", [0.2, 0.2, 0.9])]  # fmt: skip
    found = [replace(c, q={"q/base": c.q["q/base"]}) for c in found]

    def score(before: dict[str, float], after: dict[str, float]) -> float:
        return 2 * after["q/base"] - before["q/base"]

    lowest = [lowest_step(c, score) for c in found]
    assert lowest == pytest.approx([0.1, 0.3, 0.2])
    assert pick(found, "pav", "q/base", score) == 1
    unfinished = [replace(found[1], finished=False), found[0], found[2]]
    assert pick(unfinished, "pav", "q/base", score) == 2


def test_rule_that_reads_what_is_not_there_is_refused() -> None:
    for rule in get_args(Pick):
        check_pick(rule, ["q/base", "orm"], "q/base", "v")
    with pytest.raises(UserError) as error:
        check_pick("orm", ["q/base"], "q/base", "v")
    assert str(error.value) == (
        "pick orm reads an ORM head, which 'v' does not have; choose last, min, pav, vote or "
        "majority"
    )
    with pytest.raises(UserError, match=r"a Q head, .* choose orm, orm_vote or majority"):
        check_pick("pav", ["orm"], "", "v")


# Eighths: sums are exact, ties happen.
values = st.integers(0, 8).map(lambda i: i / 8)
candidates = st.lists(
    st.builds(
        candidate,
        answer=st.sampled_from([None, "1", "2", "3"]),
        q=st.lists(values, min_size=2, max_size=4),
        orm=values,
        finished=st.booleans(),
    ),
    max_size=8,
)


def weight(rule: Pick, c: Candidate) -> float:
    q = c.q["q/base"]
    return {
        "last": q[-1], "min": min(q[1:]), "orm": c.q["orm"][0], "vote": q[-1],
        "orm_vote": c.q["orm"][0], "majority": 1.0,
    }[rule]  # fmt: skip


@patient
@given(candidates, st.sampled_from(["last", "min", "orm"]))
def test_ranking_rules_take_the_earliest_best_finished_candidate(
    found: list[Candidate], rule: Pick
) -> None:
    finished = [i for i, c in enumerate(found) if c.finished]
    best = max((weight(rule, found[i]) for i in finished), default=None)
    wanted = next((i for i in finished if weight(rule, found[i]) == best), None)
    assert pick(found, rule, "q/base") == wanted


@patient
@given(candidates, st.sampled_from(["vote", "orm_vote", "majority"]))
def test_voting_rules_take_the_best_candidate_of_the_heaviest_answer(
    found: list[Candidate], rule: Pick
) -> None:
    finished = [i for i, c in enumerate(found) if c.finished]
    votes: dict[str, float] = defaultdict(float)
    for i in finished:
        answer = found[i].answer
        if answer is not None:
            votes[answer] += weight(rule, found[i])
    chosen = pick(found, rule, "q/base")
    if not votes:
        assert chosen == (finished[0] if finished else None)
        return
    assert chosen is not None and found[chosen].finished
    answer = found[chosen].answer
    assert answer is not None and votes[answer] == max(votes.values())
    # Of equally heavy answers the one that was first given.
    first = {a: min(i for i in finished if found[i].answer == a) for a in votes}
    assert first[answer] == min(first[a] for a in votes if votes[a] == votes[answer])
    same = [i for i in finished if found[i].answer == answer]
    best = max(weight(rule, found[i]) for i in same)
    assert chosen == next(i for i in same if weight(rule, found[i]) == best)


@patient
@given(candidates, st.sampled_from(RULES))
def test_unfinished_candidates_have_no_say(found: list[Candidate], rule: Pick) -> None:
    finished = [c for c in found if c.finished]
    with_all, without = pick(found, rule, "q/base"), pick(finished, rule, "q/base")
    if without is None:
        assert with_all is None
    else:
        assert with_all is not None and found[with_all] is finished[without]
