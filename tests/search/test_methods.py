"""What steps are worth, DVTS, particle filtering, AlphaLLM's bonus, and searches that fail."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.steps import StepRule
from pav.engine.loading import EngineConfig
from pav.engine.loop import PATIENCE, drive
from pav.policy.cost import Cost
from pav.policy.policy import Policy, PolicyConfig, Sampler, load_policy
from pav.verifier.pick import Candidate
from pav.verifier.score import Score, check_prover, prover_q, step_score
from search.alphallm import AlphaLlmConfig, alphallm
from search.beam import BeamConfig, beam
from search.compare.command import CompareConfig, Method, compare
from search.dvts import DvtsConfig, dvts
from search.methods.alphallm import alphallm_search, bonuses
from search.methods.beam import BeamSettings, beam_search
from search.methods.context import SearchContext
from search.methods.dvts import dvts_search
from search.methods.expand import SearchResult, gather_or_cancel
from search.methods.smc import (
    Resampling,
    SmcSettings,
    Weight,
    particle_filter,
    potential,
    resample,
)
from search.run import solve
from search.run.failures import ERRORS, truncated_share
from search.run.oracle import by_oracle, pass_at
from search.run.records import Record, read
from search.smc import SmcConfig, smc
from tests.search.scripted import PROBLEM, Scripted

ENGINE = EngineConfig(kv_gib=0.02, max_num_seqs=64)
SAMPLER = Sampler(max_length=128)
HEADS = ["q/a", "q/b", "orm"]
chances = st.floats(0.0, 1.0)
# Time is the machine's: it fails no test.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def policy(tiny_model: Callable[..., Path]) -> Policy:
    return load_policy(PolicyConfig(str(tiny_model("llama"))), StepRule())


@pytest.fixture(scope="module")
def verifier(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path_factory: pytest.TempPathFactory
) -> str:
    path = tmp_path_factory.mktemp("verifier") / "pav.ckpt"
    make_verifier(tiny_model("llama"), path, heads=("q/base", "q/prover", "orm"), sampler=SAMPLER)
    return str(path)


def texts(policy: Policy, candidates: Sequence[Candidate]) -> list[str]:
    return [policy.text(c.ids) for c in candidates]


# -- what a step is worth --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "alpha", "kept"),
    [
        ("q", 0.5, ["1\nA3", "1\nA1"]),
        ("a", 0.0, ["2\nA1", "1\nA3"]),
        ("q+a", 0.0, ["1\nA3", "1\nA1"]),
        ("q+a", 0.19, ["1\nA3", "1\nA1"]),
        ("q+a", 0.21, ["1\nA3", "2\nA1"]),
        ("q+a", 1.0, ["1\nA3", "2\nA1"]),
    ],
)
def test_worked_example_of_the_paper_flips_at_alpha_of_a_fifth(
    policy: Policy, score: Score, alpha: float, kept: list[str]
) -> None:
    """Fig. 2a: two states worth .60 and .30, three actions each, two places."""
    values = {"1\n": 0.6, "2\n": 0.3, "1\nA1$": 0.55, "1\nA2$": 0.5, "1\nA3$": 0.7,
              "2\nA1$": 0.5, "2\nA2$": 0.35, "2\nA3$": 0.25}  # fmt: skip
    actions = ["A1$", "A2$", "A3$"]
    scripted = Scripted(policy, {"": ["1\n", "2\n"] * 3, "1\n": actions, "2\n": actions},
                        {text: (v, v) for text, v in values.items()})  # fmt: skip
    engine: Any = scripted
    ranked = BeamSettings(2, 3, alpha, "q/prover", "q/base", score)
    found = asyncio.run(
        beam_search(
            SearchContext(PROBLEM, engine, policy, Sampler(max_length=64), 0), ranked, engine
        )
    )
    assert texts(policy, found.candidates) == kept


@patient
@given(st.dictionaries(st.sampled_from(HEADS[:2]), st.floats(0.01, 9), min_size=1), chances,
       chances)  # fmt: skip
def test_prover_of_several_heads_is_their_weighted_mean(
    weights: dict[str, float], a: float, b: float
) -> None:
    values = {"q/a": a, "q/b": b}
    text = ",".join(f"{h}:{w}" for h, w in weights.items())
    check_prover(text, HEADS)
    wanted = sum(w * values[h] for h, w in weights.items()) / sum(weights.values())
    assert prover_q(text, "q/a", values) == pytest.approx(wanted)


def test_prover_may_mix_heads_and_best_of_k() -> None:
    values = {"q/a": 0.5, "q/b": 0.25}
    assert prover_q("bo2", "q/a", values) == 0.75
    assert prover_q("q/b", "q/a", values) == 0.25
    assert prover_q("bo2:1, q/b:3", "q/a", values) == pytest.approx((0.75 + 3 * 0.25) / 4)
    # A step under the mean: Q_base + alpha * (mean after - mean before).
    before, after = {"q/a": 0.5, "q/b": 0.25}, {"q/a": 0.6, "q/b": 0.75}
    mean = "q/a:0.5,q/b:0.5"
    assert step_score(before, after, "q/a", mean, 2.0, "q+a") == pytest.approx(0.6 + 2 * 0.3)
    assert step_score(before, after, "q/a", mean, 2.0, "a") == pytest.approx(0.3)
    assert step_score(before, after, "q/a", mean, 2.0, "q") == 0.6


@pytest.mark.parametrize(
    ("prover", "message"),
    [
        ("q/c", "prover is 'q/c'; give bo<K>"),
        ("bo0:1", "prover is 'bo0:1'; give bo<K>"),
        ("q/a:0.5,q/c:0.5", "or a weighted mean such as"),
        ("q/a:0", "gives q/a the weight 0.0; give one above 0"),
        ("q/a:-1,q/b:2", "gives q/a the weight -1.0"),
        ("q/a:nan", "gives q/a the weight nan"),
        ("q/a:0.5,", "prover is 'q/a:0.5,'"),
    ],
)
def test_prover_that_cannot_be_computed_is_refused(prover: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        check_prover(prover, HEADS)
    assert message in str(refused.value) and "\n" not in str(refused.value)


# -- DVTS ------------------------------------------------------------------------------------------

TREE = {
    "": ["1\n", "2\n", "3\n", "4\n"],
    "1\n": ["A1$", "5\n"], "2\n": ["A2$", "5\n"], "3\n": ["A3$", "5\n"], "4\n": ["A4$", "5\n"],
    "1\n5\n": ["A1$"], "2\n5\n": ["A2$"], "3\n5\n": ["A3$"], "4\n5\n": ["A4$"],
}  # fmt: skip


def search_dvts(policy: Policy, n: int, samples: int) -> tuple[SearchResult, Scripted, Cost]:
    scripted = Scripted(policy, TREE, {"4\n": (0.9, 0), "1\n": (0.1, 0)}, by_seed=True)
    engine: Any = scripted
    cost = Cost()
    ranked = BeamSettings(n, samples, 0.0, "q/prover", "q/base")
    found = asyncio.run(
        dvts_search(
            SearchContext(PROBLEM, engine, policy, Sampler(max_length=64), 0, cost), ranked, engine
        )
    )
    return found, scripted, cost


def test_subtrees_are_independent_of_each_other(policy: Policy) -> None:
    many, _, _ = search_dvts(policy, 6, 2)
    for n in (1, 3):
        few, _, _ = search_dvts(policy, n, 2)
        assert [c.ids for c in few.candidates] == [c.ids for c in many.candidates[:n]]
    # The same best first step in several subtrees: nothing merges them.
    first = Counter(t[0] for t in texts(policy, many.candidates))
    assert len(many.candidates) == 6 and max(first.values()) > 1


def test_every_subtree_draws_its_children_and_keeps_the_best(policy: Policy) -> None:
    found, scripted, cost = search_dvts(policy, 5, 3)
    assert sum(before == "" for before, _ in scripted.drawn) == 5 * 3
    first = found.steps[0]
    by_tree: dict[int, list[float]] = {}
    for (parent, kept, score, _), node in zip(first, found.nodes[0], strict=True):
        assert parent == 0
        if kept:
            by_tree[node.places[0]] = [score]
    # Five subtrees, one place each.
    assert sorted(by_tree) == [0, 1, 2, 3, 4]
    for (parent, _, _, _), node in zip(found.steps[1], found.nodes[1], strict=True):
        assert node.places in ([], [parent])
    merged = sum(len(r) for r in found.steps) + found.merged + found.truncated
    assert merged == len(scripted.drawn)
    assert cost.policy_tokens == sum(len(t) for _, t in scripted.drawn)


def test_truncated_subtree_leaves_the_others_alone(policy: Policy) -> None:
    # A step of four characters hits the cap in the subtrees that draw it.
    room = len(policy.encode(PROBLEM)) + 4
    scripted = Scripted(policy, {"": ["1111", "A2$"]}, by_seed=True)
    engine: Any = scripted
    ranked = BeamSettings(8, 1, 0.0, "q/prover", "q/base")
    found = asyncio.run(
        dvts_search(
            SearchContext(PROBLEM, engine, policy, Sampler(max_length=room), 0), ranked, engine
        )
    )
    assert found.truncated + len(found.candidates) == 8
    assert 0 < found.truncated < 8
    assert all(c.finished and not c.truncated for c in found.candidates)


# -- particle filtering ----------------------------------------------------------------------------

weights = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12).filter(lambda w: sum(w) > 1e-3)
HOW: tuple[Resampling, ...] = ("systematic", "multinomial")


@patient
@given(weights, st.integers(1, 20), st.integers(0, 2**32), st.sampled_from(HOW))
def test_resampling_draws_count_indices_and_none_of_weight_zero(
    given_weights: list[float], count: int, seed: int, how: Resampling
) -> None:
    drawn = resample(given_weights, count, how, np.random.default_rng(seed))
    assert len(drawn) == count and drawn == sorted(drawn)
    assert all(given_weights[i] > 0 for i in drawn)
    assert drawn == resample(given_weights, count, how, np.random.default_rng(seed))


@patient
@given(weights, st.integers(1, 20), st.integers(0, 2**32))
def test_systematic_resampling_is_within_one_of_the_share(
    given_weights: list[float], count: int, seed: int
) -> None:
    drawn = Counter(resample(given_weights, count, "systematic", np.random.default_rng(seed)))
    for i, weight in enumerate(given_weights):
        assert abs(drawn[i] - count * weight / sum(given_weights)) < 1 + 1e-9


@pytest.mark.parametrize("how", HOW)
def test_resampling_is_unbiased(how: Resampling) -> None:
    given_weights, count, repeats = [0.1, 0.0, 0.5, 0.15], 5, 4000
    rng = np.random.default_rng(0)
    total = Counter(i for _ in range(repeats) for i in resample(given_weights, count, how, rng))
    for i, weight in enumerate(given_weights):
        # Five standard errors of the noisier scheme.
        share = weight / sum(given_weights)
        error = 5 * np.sqrt(count * share * (1 - share) / repeats)
        assert abs(total[i] / repeats - count * share) <= error


@patient
@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=8))
def test_weights_by_change_multiply_to_the_change_of_q(q: list[float]) -> None:
    product = np.prod([potential(q[: j + 1], "change", True) for j in range(1, len(q))])
    assert product == pytest.approx(q[-1] / q[0])
    # A finished particle has no step, hence no change; the other weights look at Q alone.
    assert potential(q, "change", False) == 1.0
    assert potential(q, "q", False) == q[-1]
    assert potential(q, "odds", True) == pytest.approx(q[-1] / (1 - q[-1]))


def filtered(
    policy: Policy, scripted: Scripted, n: int, weight: Weight = "q", cap: int = 64,
    how: Resampling = "systematic", seed: int = 0,
) -> tuple[SearchResult, Cost]:  # fmt: skip
    engine: Any = scripted
    cost = Cost()
    found = asyncio.run(
        particle_filter(
            SearchContext(PROBLEM, engine, policy, Sampler(max_length=cap), seed, cost),
            SmcSettings(n, "q/base", weight, how), engine,
        )
    )  # fmt: skip
    return found, cost


def test_particles_without_a_chance_give_their_place_to_others(policy: Policy) -> None:
    scripted = Scripted(policy, {"": ["1\n", "2\n", "1\n", "2\n"], "1\n": ["A1$"] * 4},
                        {"2\n": (0.0, 0)})  # fmt: skip
    found, _ = filtered(policy, scripted, 4)
    assert texts(policy, found.candidates) == ["1\nA1"] * 4
    assert [before for before, _ in scripted.drawn] == [""] * 4 + ["1\n"] * 4
    kept = {text: kept for _, kept, _, text in found.steps[0]}
    assert kept == {"1": True, "2": False}
    # Two particles with two offspring each.
    assert [node.places for node in found.nodes[0]] == [[0, 1], [], [2, 3], []]


def test_finished_particle_takes_part_in_the_resampling_and_draws_no_more(policy: Policy) -> None:
    scripted = Scripted(policy, {"": ["A7$", "1\n"], "1\n": ["2\n"], "1\n2\n": ["A1$"]},
                        {"A7$": (0.5, 0)})  # fmt: skip
    found, cost = filtered(policy, scripted, 2)
    # Equal weights: systematic resampling keeps both.
    assert sorted(texts(policy, found.candidates)) == ["1\n2\nA1", "A7"]
    assert len(scripted.drawn) == 4
    assert cost.policy_tokens == 3 + 2 + 2 + 3


def test_truncated_particle_has_weight_zero_and_is_counted(policy: Policy) -> None:
    cap = len(policy.encode(PROBLEM)) + 8
    scripted = Scripted(policy, {"": ["1\n", "11111111", "1\n"], "1\n": ["A1$"] * 3})
    found, _ = filtered(policy, scripted, 3, cap=cap)
    assert texts(policy, found.candidates) == ["1\nA1"] * 3 and found.truncated == 1
    gone = Scripted(policy, {"": ["11111111", "22222222"]})
    found, _ = filtered(policy, gone, 2, cap=cap)
    assert found.candidates == [] and found.truncated == 2
    found, _ = filtered(policy, Scripted(policy, {}), 2, cap=3)
    assert found.candidates == [] and found.truncated == 2


def test_particles_that_agree_are_read_once(policy: Policy) -> None:
    scripted = Scripted(policy, {"": ["1\n"] * 4, "1\n": ["A1$", "A2$", "A1$", "A2$"]})
    found, cost = filtered(policy, scripted, 4)
    assert len(found.candidates) == 4
    # The problem itself, one step, two answers.
    assert cost.verifier_tokens == 1 + 1 + 2


@pytest.mark.parametrize("how", HOW)
def test_particles_follow_policy_times_q(policy: Policy, how: Resampling) -> None:
    """Weights by change, on a tree whose first steps the policy draws alike and Q tells apart."""
    script = {"": ["1\n", "2\n"], "1\n": ["A1$"], "2\n": ["A2$"]}
    q = {"1\n": (0.2, 0), "2\n": (0.6, 0), "1\nA1$": (0.2, 0), "2\nA2$": (0.6, 0), "": (0.4, 0)}
    found: Counter[str] = Counter()
    for seed in range(300):
        scripted = Scripted(policy, script, q, by_seed=True)
        result, _ = filtered(policy, scripted, 8, "change", how=how, seed=seed)
        found.update(texts(policy, result.candidates))
    share = found["2\nA2"] / found.total()
    # 0.6 / (0.6 + 0.2), up to the bias of eight particles and the noise of 300 runs.
    assert share == pytest.approx(0.75, abs=0.03)


# -- AlphaLLM's bonus ------------------------------------------------------------------------------


def test_bonus_is_the_root_of_the_share_of_importance() -> None:
    found = bonuses({0: 0.3, 1: 0.1, 4: 0.0}, 0.25)
    assert found == {0: pytest.approx(0.25 * 0.75**0.5), 1: pytest.approx(0.125), 4: 0.0}
    assert bonuses({0: 0.0, 1: 0.0}, 0.25) == {0: 0.0, 1: 0.0}


def test_bonus_moves_width_to_prefixes_whose_children_differ(policy: Policy) -> None:
    script = {"": ["1\n", "2\n", "1\n", "2\n"], "1\n": ["A1$", "A2$"], "2\n": ["A3$", "A4$"]}
    # Under 1 nothing changes; under 2 one step is much worse and one a little worse than those.
    q = {"1\n": 0.5, "2\n": 0.45, "1\nA1$": 0.5, "1\nA2$": 0.5, "2\nA3$": 0.05, "2\nA4$": 0.4}

    def best(bonus: float) -> tuple[str, float]:
        scripted = Scripted(policy, script, {text: (v, v) for text, v in q.items()})
        engine: Any = scripted
        ranked = BeamSettings(2, 2, 0.0, "q/prover", "q/base", "q")
        found = asyncio.run(
            alphallm_search(
                SearchContext(PROBLEM, engine, policy, Sampler(max_length=64), 0),
                ranked,
                bonus,
                engine,
            )
        )
        return texts(policy, found.candidates)[0], found.candidates[0].score

    assert best(0.0) == ("1\nA1", 0.5)
    assert best(0.25) == ("2\nA4", pytest.approx(0.4 + 0.25))


# -- oracle ----------------------------------------------------------------------------------------


def record(right: list[bool], error: str | None = None) -> Record:
    candidates = [Candidate([], [], {}, 0.0, True, False, correct=c) for c in right]
    return Record("p", "q", "1", "best-of-N", len(right), 0, {}, candidates=candidates, error=error)


def test_pass_at_n_is_unbiased_and_counts_failures_as_wrong() -> None:
    records = [record([True, False, False, False]), record([False] * 4), record([], "boom")]
    # 1 - C(3, n) / C(4, n)
    assert pass_at(records, 1).tolist() == pytest.approx([0.25, 0, 0])
    assert pass_at(records, 2).tolist() == pytest.approx([0.5, 0, 0])
    assert pass_at(records, 4).tolist() == pytest.approx([1, 0, 0])
    assert [by_oracle(r).correct for r in records] == [True, False, False]
    with pytest.raises(UserError, match="needs at least 5"):
        pass_at(records, 5)


# -- failures --------------------------------------------------------------------------------------


def failing(real: Any, bad: Callable[[str], bool]) -> Any:
    async def search(context: SearchContext, *args: Any, **kwargs: Any) -> SearchResult:
        found: SearchResult = await real(context, *args, **kwargs)
        if bad(context.problem.id):
            raise ZeroDivisionError("by\nnothing")
        return found

    return search


def test_problem_that_raises_counts_as_wrong_is_named_and_tried_again(
    verifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = BeamConfig(verifier, n=2, problems=4, output=str(tmp_path / "run"), engine=ENGINE,
                        sampler=SAMPLER)  # fmt: skip
    path = tmp_path / "run" / "beam.jsonl"
    beam(replace(config, output=str(tmp_path / "sound")))
    sound = {r.problem_id: r for r in read(tmp_path / "sound" / "beam.jsonl")}
    worst = sorted(sound)[0]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(solve, "beam_search", failing(solve.beam_search, lambda p: p == worst))
        # A bug is no wrong answer: results are shown, and the command fails.
        with pytest.raises(UserError, match=r"beam N=2: 25.0% of the problems failed .*errors.log"):
            beam(config)
    said = capsys.readouterr()
    records = {r.problem_id: r for r in read(path)}
    assert len(records) == 4
    one = records.pop(worst)
    assert one.error == "ZeroDivisionError: by nothing"
    assert not one.correct and one.picked is None and one.candidates == []
    # What was spent before it failed is not forgotten.
    assert one.policy_tokens == sound[worst].policy_tokens > 0
    assert all(records[p] == sound[p] for p in records)
    assert f"WARNING: beam N=2: 1 of 4 problems failed ({worst}: ZeroDivisionError" in said.err
    assert "4 test problems" in said.out
    logged = (tmp_path / "run" / ERRORS).read_text()
    assert f"beam of problem {worst}\nTraceback" in logged
    assert 'raise ZeroDivisionError("by\\nnothing")' in logged
    # The same command tries it again, and the file ends with one line per problem.
    beam(config)
    again = {r.problem_id: r for r in read(path)}
    assert again.keys() == sound.keys() and again[worst].error is None
    assert all(again[p] == records[p] for p in records)
    assert path.read_bytes().count(b"\n") == 4

    monkeypatch.setattr(solve, "beam_search", failing(solve.beam_search, lambda _: True))
    with pytest.raises(UserError, match=r"4 of 4 problems failed .*mend the cause"):
        beam(replace(config, output=str(tmp_path / "none")))
    assert len(read(tmp_path / "none" / "beam.jsonl")) == 4


def test_jobs_beside_one_that_raises_are_cancelled() -> None:
    async def main() -> None:
        ended: list[int] = []

        async def wait(i: int) -> int:
            try:
                await asyncio.sleep(0 if i == 1 else 1000)
            finally:
                ended.append(i)
            raise ValueError(i)

        with pytest.raises(ValueError, match="1"):
            await gather_or_cancel(wait(i) for i in range(3))
        assert sorted(ended) == [0, 1, 2]

    asyncio.run(main())


@dataclass
class Counting:
    """An engine that answers every request after so many steps of its own."""

    waiting: list[tuple[int, asyncio.Future[int]]] = field(default_factory=list)
    steps: int = 0

    async def after(self, steps: int) -> int:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.waiting.append((self.steps + steps, future))
        return await future

    @property
    def busy(self) -> int:
        return len(self.waiting)

    def step(self) -> None:
        self.steps += 1
        for entry in [e for e in self.waiting if e[0] <= self.steps]:
            self.waiting.remove(entry)
            entry[1].set_result(self.steps)


def test_slow_problem_does_not_hold_up_another() -> None:
    engine = Counting()
    done: list[tuple[str, int]] = []

    async def problem(name: str, rounds: int, each: int) -> tuple[str, int]:
        at = 0
        for _ in range(rounds):
            # A round waits for its own two children and for nobody else's.
            at = max(await gather_or_cancel(engine.after(each) for _ in range(2)))
        return name, at

    jobs = [lambda: problem("slow", 3, 100), lambda: problem("fast", 3, 2)]
    drive([engine], jobs, done.append, 2)
    assert done == [("fast", 6), ("slow", 300)]


def test_engine_with_few_requests_waits_for_company_and_never_for_long() -> None:
    policy, verifier = Counting(), Counting()
    waits: list[int] = []

    async def problem(i: int) -> int:
        sampled = await policy.after(1 + i)
        await verifier.after(1)
        return policy.steps - sampled

    # One child ends in every step of the policy.
    drive([policy, verifier], [lambda i=i: problem(i) for i in range(64)], waits.append, 64)  # type: ignore[misc]
    assert policy.steps == 64
    assert verifier.steps < 32
    assert max(waits) == PATIENCE + 1
    # With nothing else to do an engine steps at once.
    steps = verifier.steps
    drive([policy, verifier], [lambda: verifier.after(3)], waits.append, 1)
    assert verifier.steps == steps + 3


def test_jobs_that_no_engine_will_answer_are_an_error_and_no_endless_loop() -> None:
    async def never() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="2 jobs wait and no engine is busy"):
        drive([Counting()], [never, never], lambda _: None, 4)


def test_truncated_share_is_of_all_that_was_drawn() -> None:
    beam = replace(record([True]), truncated=2, merged=1,
                   steps=[[(0, True, 0.5, "1")] * 3, [(0, True, 0.5, "A1")] * 2])  # fmt: skip
    assert truncated_share([beam]) == 2 / 8
    cut = Candidate([], [], {}, 0.0, False, True)
    sampled = replace(record([True] * 3), truncated=1)
    sampled.candidates.append(cut)
    assert truncated_share([sampled]) == 1 / 4
    assert truncated_share([beam, sampled]) == 3 / 12
    assert truncated_share([]) == 0


# -- commands --------------------------------------------------------------------------------------


def test_every_method_has_a_command_with_the_same_record(
    verifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--verifier", verifier, "--n", "2", "--problems", "3", "--engine.kv_gib", "0.02"]
    wanted: dict[str, tuple[Any, Any, list[str], dict[str, Any]]] = {
        "dvts": (dvts, DvtsConfig, ["--prover", "q/prover:1,bo4:1", "--score", "a"],
                 {"samples": 3, "alpha": 0.5, "prover": "q/prover:1,bo4:1", "score": "a"}),
        "alphallm": (alphallm, AlphaLlmConfig, ["--samples", "2"],
                     {"samples": 2, "bonus": 0.25, "score": "q+bonus"}),
        "smc": (smc, SmcConfig, ["--pick", "pav", "--weight", "odds"],
                {"weight": "odds", "resampling": "systematic", "head": "q/base", "pick": "pav"}),
    }  # fmt: skip
    for name, (command, config, more, described) in wanted.items():
        runs = []
        for again in ("a", "b"):
            output = tmp_path / name / again
            run(command, config, f"search.{name}", [*common, *more, "--output", str(output)])
            runs.append(sorted((output / f"{name}.jsonl").read_text().splitlines()))
        # A repeat is bit-identical.
        assert runs[0] == runs[1]
        assert "accuracy [95%]" in capsys.readouterr().out
        assert (tmp_path / name / "a" / "report.html").is_file()
        for one in read(tmp_path / name / "a" / f"{name}.jsonl"):
            assert one.method == name and one.n == 2 and one.error is None
            assert described.items() <= one.settings.items()
            assert one.settings["scoring"] == "fused"
            assert one.settings["sampler"]["max_length"] == SAMPLER.max_length
            assert len(one.candidates) <= 2 and all(c.finished for c in one.candidates)
            assert one.policy_tokens > 0 and one.steps
            drawn = sum(map(len, one.steps)) + one.merged + one.truncated
            assert drawn >= 2 * (1 if name == "smc" else one.settings["samples"])


def test_comparison_takes_every_method_by_its_kind(verifier: str, tmp_path: Path) -> None:
    config = CompareConfig(
        methods=[
            Method("beam", verifier=verifier),
            Method("advantage alone", verifier=verifier, score="a"),
            Method("greedy", "greedy", verifier=verifier),
            Method("dvts", "dvts", verifier=verifier),
            Method("smc", "smc", verifier=verifier, weight="odds"),
            Method("alphallm", "alphallm", verifier=verifier),
            Method("pav as orm", "best_of_n", verifier, pick="pav"),
            Method("vote", "best_of_n", pick="majority"),
        ],
        output=str(tmp_path / "run"), n=[2], problems=3, engine=ENGINE,
    )  # fmt: skip
    compare(config)
    files = {p.name for p in (tmp_path / "run").glob("*.jsonl")}
    kinds = {"beam", "greedy", "dvts", "smc", "alphallm", "samples", "scored"}
    assert {f.split("-")[0] for f in files} == kinds
    # The two beams are told apart; the default's name has no word of the score.
    assert sum(f.startswith("beam-") for f in files) == 2
    greedy = read(next((tmp_path / "run").glob("greedy-*.jsonl")))
    for one in greedy:
        assert one.n == 2 and one.settings["samples"] == 3 and one.settings["places"] == 1
        assert len(one.steps[0]) + one.merged + one.truncated >= 6 - one.merged
        assert len(one.candidates) <= 1
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    # Settings that are left at their default are not part of what a run is about.
    assert "score" not in manifest["methods"][0] and manifest["methods"][1]["score"] == "a"


@patient
@given(st.lists(st.tuples(chances, chances), min_size=2, max_size=6), st.floats(0, 2))
def test_effective_score_of_a_step_is_linear_in_alpha(
    states: list[tuple[float, float]], alpha: float
) -> None:
    before, after = ({"q/a": a, "q/b": b} for a, b in states[:2])
    q = step_score(before, after, "q/a", "q/b", alpha, "q")
    a = step_score(before, after, "q/a", "q/b", alpha, "a")
    both = step_score(before, after, "q/a", "q/b", alpha, "q+a")
    assert both == pytest.approx(q + alpha * a)
