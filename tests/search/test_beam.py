"""Beam search: on real vLLM its invariants, on a scripted engine its exact semantics."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pav.core.errors import UserError
from pav.core.steps import StepRule
from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.engine.vllm import VllmEngine
from pav.policy.policy import Policy, PolicyConfig, Sampler, load_policy
from pav.tasks.base import Problem
from pav.tasks.tape import Tape
from pav.verifier.checkpoint import load_verifier
from pav.verifier.pick import Candidate
from pav.verifier.scoring import Cost
from search.beam import BeamConfig, beam
from search.best_of_n import BestOfNConfig, best_of_n
from search.methods import expand as grow
from search.methods.beam import BeamSettings, Duplicates, beam_search, divided
from search.methods.context import SearchContext
from search.methods.expand import SearchResult
from search.methods.sample_step import SampledStep
from search.run.opening import open_session
from search.run.records import Record, read
from search.run.session import Session
from search.run.solve import beam_record
from tests.search.scripted import EOS, PROBLEM, Scripted

REPOSITORY = Path(__file__).parents[2]
ENGINE = EngineConfig(kv_gib=0.02, max_num_seqs=64)
SAMPLER = Sampler(max_length=112)
N, C = 3, 3


@pytest.fixture(scope="module")
def verifier(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A verifier with random heads on a random policy; the policy's only prover is its sibling."""
    path = tmp_path_factory.mktemp("verifier") / "pav.ckpt"
    make_verifier(tiny_model("llama"), path, heads=("q/base", "q/prover", "orm"), sampler=SAMPLER)
    make_verifier(tiny_model("llama"), path.with_name("orm.ckpt"), heads=("orm",), sampler=SAMPLER)
    return str(path)


def config(verifier: str, output: Path, **changes: Any) -> BeamConfig:
    plain = BeamConfig(verifier, n=N, samples=C, problems=8, output=str(output), engine=ENGINE)
    return replace(plain, **changes)


# -- real vLLM, random weights ---------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """A call of sample_step: (problem, round) is in the seed's key."""

    problem_id: str
    round: int
    parent: tuple[int, ...]
    index: int
    step: SampledStep


@pytest.fixture(scope="module")
def searched(
    verifier: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Record], list[Draw]]:
    """A fused search: its directory, its records and every step that was drawn for it."""
    directory = tmp_path_factory.mktemp("searched") / "run"
    draws: list[Draw] = []
    sample_step = grow.sample_step

    async def spy(*args: Any) -> SampledStep:
        step = await sample_step(*args)
        _, problem, _, number, *prefix, index = args[2]
        draws.append(Draw(problem, number, tuple(prefix), index, step))
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grow, "sample_step", spy)
        beam(config(verifier, directory))
    return directory, read(directory / "beam.jsonl"), draws


def test_repeated_search_is_identical(
    verifier: str, searched: tuple[Path, list[Record], list[Draw]], tmp_path: Path
) -> None:
    def lines(directory: Path) -> list[str]:
        # Of problems that finish in the same step of the engine, any may be written first.
        return sorted((directory / "beam.jsonl").read_text().splitlines())

    beam(config(verifier, tmp_path / "again"))
    assert lines(tmp_path / "again") == lines(searched[0])
    beam(config(verifier, tmp_path / "other", seed=1))
    assert lines(tmp_path / "other") != lines(searched[0])


def test_first_round_draws_all_children_and_later_rounds_the_share_of_unfinished_places(
    searched: tuple[Path, list[Record], list[Draw]],
) -> None:
    _, records, draws = searched
    rounds: dict[tuple[str, int], Counter[tuple[int, ...]]] = defaultdict(Counter)
    times: dict[tuple[str, int], Counter[tuple[int, ...]]] = defaultdict(Counter)
    for d in draws:
        rounds[d.problem_id, d.round][d.parent] += 1
        times[d.problem_id, d.round + 1][d.parent + tuple(d.step.ids)] += 1
    assert {p for p, _ in rounds} == {r.problem_id for r in records}
    assert len(records) == 8
    for (problem, number), shares in rounds.items():
        total = sum(shares.values())
        if number == 0:
            assert dict(shares) == {(): N * C}
            continue
        assert total % C == 0 and total <= N * C
        assert len(shares) <= total // C <= N
        # Shares follow how often a step was drawn, and a finished place draws no more.
        weights = times[problem, number]
        whole = sum(weights[parent] for parent in shares)
        assert all(abs(s - total * weights[parent] / whole) < 1 for parent, s in shares.items())
        assert all(parent[-1:] != (EOS,) for parent in shares)
    assert any(number > 1 for _, number in rounds)
    assert any(len(shares) < N for (_, number), shares in rounds.items() if number > 0)


def test_children_are_kept_merged_or_truncated_and_never_lost(
    searched: tuple[Path, list[Record], list[Draw]],
) -> None:
    _, records, draws = searched
    for record in records:
        own = [d for d in draws if d.problem_id == record.problem_id]
        assert len(own) == sum(map(len, record.steps)) + record.merged + record.truncated
        # A solution that is nothing but its end has no step to score, either.
        cut = [d for d in own if d.step.truncated or (not d.parent and d.step.ids == [EOS])]
        assert record.truncated == len(cut)
        assert all(sum(kept for _, kept, _, _ in children) <= N for children in record.steps)
        # What is kept scores no less than what is not.
        for children in record.steps:
            scores = [score for _, _, score, _ in children]
            assert scores == sorted(scores, reverse=True)
        assert len({tuple(c.ids) for c in record.candidates}) == len(record.candidates) <= N
    assert sum(r.truncated for r in records) > 0


def test_policy_tokens_are_all_sampled_tokens(
    searched: tuple[Path, list[Record], list[Draw]],
) -> None:
    _, records, draws = searched
    for record in records:
        own = [d for d in draws if d.problem_id == record.problem_id]
        assert record.policy_tokens == sum(len(d.step.ids) for d in own)
        assert record.verifier_tokens == record.verifier_cached == 0


def test_pick_is_a_finished_candidate_and_an_unfinished_one_is_never_right(
    searched: tuple[Path, list[Record], list[Draw]],
) -> None:
    for record in searched[1]:
        assert all(c.finished and c.ids[-1] == EOS for c in record.candidates)
        if record.picked is None:
            assert record.candidates == [] and record.answer is None and not record.correct
        else:
            assert record.answer == record.candidates[record.picked].answer
    assert any(record.picked is not None for record in searched[1])


def test_lineage_leads_from_every_child_to_the_root(
    searched: tuple[Path, list[Record], list[Draw]],
) -> None:
    for record in searched[1]:
        assert [len(r) for r in record.nodes] == [len(r) for r in record.steps]
        at: dict[int, str] = {0: ""}
        whole = set()
        for steps, nodes in zip(record.steps, record.nodes, strict=True):
            paths = [at[parent] + text + "\n" for parent, _, _, text in steps]
            assert [bool(n.places) for n in nodes] == [kept for _, kept, _, _ in steps]
            whole |= {p.rstrip("\n") for p, n in zip(paths, nodes, strict=True) if n.finished}
            at = {i: p for p, n in zip(paths, nodes, strict=True) for i in n.places}
            assert all(n.q.keys() == {"q/base", "q/prover", "orm"} for n in nodes)
        assert {c.text.rstrip("\n") for c in record.candidates} <= whole


def test_fused_and_separate_scores_agree_where_the_trunk_is_the_policy(
    verifier: str, searched: tuple[Path, list[Record], list[Draw]]
) -> None:
    loaded = load_verifier(verifier)
    session = open_session(loaded, None, None, None, ENGINE)
    scorer = session.scorer(loaded, "separate", True, None)
    assert not scorer.fused
    compared = 0

    async def judge(record: Record, c: Candidate) -> float:
        problem = Problem(record.problem_id, record.question)
        cost, worst = Cost(), 0.0
        for j, end in enumerate((0, *c.ends)):
            values = (await scorer.read(problem, c.ids[:end], c.ends[:j], cost)).values
            assert values.keys() == c.q.keys() == {"q/base", "q/prover", "orm"}
            worst = max(worst, *(abs(c.q[head][j] - values[head]) for head in values))
        assert cost.verifier_tokens + cost.verifier_cached > 0
        return worst

    def keep(worst: float) -> None:
        nonlocal compared
        compared += 1
        assert worst <= 1e-4

    jobs = [partial(judge, record, c) for record in searched[1] for c in record.candidates]
    drive([scorer.engine], jobs, keep, 16)
    session.shutdown()
    assert compared >= 6


def test_separate_search_pays_for_reading_and_keeps_the_same_rules(
    verifier: str, searched: tuple[Path, list[Record], list[Draw]], tmp_path: Path
) -> None:
    beam(config(verifier, tmp_path / "run", scoring="separate", problems=3))
    records = read(tmp_path / "run" / "beam.jsonl")
    fused = {r.problem_id: r for r in searched[1]}
    for record in records:
        assert record.settings["scoring"] == "separate"
        assert record.verifier_tokens > 0
        # The same problems under the same seed: step 0 is worth the same.
        for c in record.candidates:
            for other in fused[record.problem_id].candidates[:1]:
                assert {h: q[0] for h, q in c.q.items()} == pytest.approx(
                    {h: q[0] for h, q in other.q.items()}, abs=1e-4
                )


def test_baseline_orm_runs_beside_a_fused_beam_at_its_tokens(
    verifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beam(
        config(
            verifier, tmp_path / "run", baseline="orm", problems=3, sampler=Sampler(max_length=200)
        )
    )
    same, equal = (read(tmp_path / "run" / f"best_of_n{x}.jsonl") for x in ("", "_equal_tokens"))
    beams = read(tmp_path / "run" / "beam.jsonl")
    assert [r.n for r in same] == [N] * 3
    per_trace = np.mean([c.tokens for r in same for c in r.candidates])
    wanted = int(np.ceil(np.mean([r.policy_tokens for r in beams]) / per_trace))
    assert [r.n for r in equal] == [max(N, wanted)] * 3
    # The smaller sample set is the beginning of the larger one.
    for few, many in zip(
        sorted(same, key=lambda r: r.problem_id), sorted(equal, key=lambda r: r.problem_id),
        strict=True,
    ):  # fmt: skip
        assert [c.ids for c in few.candidates] == [c.ids for c in many.candidates[:N]]
    printed = capsys.readouterr().out
    for method in ("PAV beam", "best-of-N, ORM", "ORM-weighted vote", "majority vote"):
        assert method in printed


def test_problem_whose_prompt_leaves_no_room_counts_as_wrong_and_ends_the_command_in_an_error(
    verifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = Sampler(max_length=14)
    cut = r"100.0% of what was sampled hit sampler.max_length \(14\).* raise sampler.max_length"
    with pytest.raises(UserError, match=f"^beam N=2: {cut}"):
        beam(
            config(verifier, tmp_path / "beam", n=2, sampler=short, scoring="separate", problems=3)
        )
    # Not before all is written and shown.
    assert "PAV beam (last)" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"^best-of-2: {cut}"):
        best_of_n(
            BestOfNConfig(
                verifier, n=2, problems=3, sampler=short, output=str(tmp_path / "best"),
                engine=ENGINE,
            )
        )  # fmt: skip
    assert "oracle pass@k" in capsys.readouterr().out
    for records in (read(tmp_path / "beam/beam.jsonl"), read(tmp_path / "best/best_of_n.jsonl")):
        assert len(records) == 3
        assert all(r.picked is None and not r.correct and r.truncated > 0 for r in records)


def test_command_prints_a_table_and_the_same_command_searches_nothing_again(
    verifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "search.beam", "--verifier", verifier, "--n", "2",
               "--problems", "2", "--output", str(tmp_path / "run"),
               "--engine.kv_gib", "0.02"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    assert "PAV beam (last)" in done.stdout and "accuracy [95%]" in done.stdout
    records = (tmp_path / "run" / "beam.jsonl").read_bytes()
    assert records.count(b"\n") == 2

    async def never(*_: Any) -> Record:
        raise AssertionError("searched again")

    monkeypatch.setattr("search.beam.beam_record", never)
    monkeypatch.setattr(VllmEngine, "start", lambda _: pytest.fail("an engine was started"))
    same = BeamConfig(verifier, n=2, problems=2, output=str(tmp_path / "run"),
                      engine=EngineConfig(kv_gib=0.02))  # fmt: skip
    beam(same)
    assert (tmp_path / "run" / "beam.jsonl").read_bytes() == records
    with pytest.raises(UserError, match="was made with another n, problems"):
        beam(replace(same, n=3, problems=3))


def test_interrupted_search_owes_only_what_is_missing(
    verifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config(verifier, tmp_path / "run", problems=4)
    searched: list[str] = []

    async def counting(*args: Any) -> Record:
        searched.append(args[-1].id)
        if len(searched) == 4:
            raise KeyboardInterrupt
        return await beam_record(*args)

    monkeypatch.setattr("search.beam.beam_record", counting)
    with pytest.raises(KeyboardInterrupt):
        beam(replace(whole, concurrency=1))
    assert len(read(tmp_path / "run" / "beam.jsonl")) == 3
    beam(whole)
    assert len(searched) == 5 and searched[3] == searched[4]
    assert len(read(tmp_path / "run" / "beam.jsonl")) == 4


def test_fused_scoring_is_refused_where_the_trunk_is_asked_in_another_way(
    verifier: str, tiny_model: Callable[..., Path], make_verifier: Any, tmp_path: Path
) -> None:
    """Scores that ride along are those of the policy's prompt, not of the trunk's."""
    make_verifier(tiny_model("llama"), tmp_path / "pav.ckpt", sampler=SAMPLER)
    loaded = load_verifier(str(tmp_path / "pav.ckpt"))
    prompt = {**loaded.card.prompt, "template": "={question}\n"}
    asked = replace(loaded, card=replace(loaded.card, prompt=prompt))
    session = open_session(asked, None, None, None, ENGINE)
    with pytest.raises(UserError, match=r"prompt.*use --scoring separate"):
        session.scorer(asked, "fused", True, None)
    assert not session.scorer(asked, "auto", True, None).fused
    session.shutdown()


# -- a scripted engine -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tiny_model: Callable[..., Path]) -> Policy:
    return load_policy(PolicyConfig(str(tiny_model("llama"))), StepRule())


def search(
    scripted: Scripted, n: int, samples: int, alpha: float = 0.0, prover: str = "q/prover",
    max_length: int = 64, duplicates: Duplicates = "weigh",
) -> tuple[SearchResult, Cost]:  # fmt: skip
    cost = Cost()
    engine: Any = scripted
    settings = BeamSettings(n, samples, alpha, prover, "q/base", duplicates=duplicates)
    result = asyncio.run(
        beam_search(
            SearchContext(
                PROBLEM, engine, scripted.policy, Sampler(max_length=max_length), 0, cost
            ),
            settings,
            engine,
        )
    )
    return result, cost


def texts(scripted: Scripted, result: SearchResult) -> list[str]:
    return [scripted.policy.text(c.ids) for c in result.candidates]


def test_duplicates_are_merged_and_their_width_goes_to_the_distinct_ones(policy: Policy) -> None:
    scripted = Scripted(policy, {
        "": ["1\n", "1\n", "1\n", "1\n"],
        "1\n": ["A1$", "A2$", "A2$", "A3$"],
    }, {"1\nA3$": (0.9, 0.9), "1\nA2$": (0.8, 0.8)})  # fmt: skip
    result, cost = search(scripted, n=2, samples=2)
    # Four draws gave one beam; the next four all go to it.
    assert [before for before, _ in scripted.drawn] == [""] * 4 + ["1\n"] * 4
    assert texts(scripted, result) == ["1\nA3", "1\nA2"]
    assert result.merged == 3 + 1
    # Merged ones were paid for, newlines and ends included.
    assert cost.policy_tokens == 4 * 2 + 4 * 3


def test_weighed_places_draw_as_often_as_their_step_was_drawn(policy: Policy) -> None:
    answers = {
        "": ["1\n", "2\n", "1\n", "1\n"],
        "1\n": ["A1$", "3\n", "3\n"],
        "2\n": ["A2$"],
        "1\n3\n": ["A4$", "A5$"],
    }
    values = {"1\nA1$": (0.5, 0.5), "1\n3\n": (0.9, 0.9), "1\n3\nA4$": (0.9, 0.9)}
    scripted = Scripted(policy, answers, values)
    result, _ = search(scripted, n=2, samples=2)
    drawn = [before for before, _ in scripted.drawn]
    # 3 to 1 in the second round. In the third one place is finished: two draws are left.
    assert drawn == [""] * 4 + ["1\n"] * 3 + ["2\n"] + ["1\n3\n"] * 2
    assert texts(scripted, result)[0] == "1\n3\nA4"


def test_merged_places_draw_alike_however_often_their_step_was_drawn(policy: Policy) -> None:
    scripted = Scripted(policy, {
        "": ["1\n", "2\n", "1\n", "1\n"],
        "1\n": ["A1$", "A2$"],
        "2\n": ["A1$", "A2$"],
    }, {})  # fmt: skip
    search(scripted, n=2, samples=2, duplicates="merge")
    assert [before for before, _ in scripted.drawn] == [""] * 4 + ["1\n"] * 2 + ["2\n"] * 2


@given(st.integers(0, 100), st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_draws_are_divided_in_proportion_and_none_is_lost(draws: int, weights: list[int]) -> None:
    shares = divided(draws, weights)
    assert sum(shares) == draws
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - draws * weight / sum(weights)) < 1


def test_draws_are_shared_evenly_and_a_finished_place_draws_no_more(policy: Policy) -> None:
    scripted = Scripted(policy, {
        "": ["A7$", "1\n", "2\n", "3\n", "4\n", "5\n"],
        "1\n": ["A1$", "A2$"],
        "2\n": ["A1$", "A2$"],
    }, {"A7$": (0.9, 0), "1\n": (0.8, 0), "2\n": (0.7, 0), "1\nA1$": (0.6, 0),
        "2\nA2$": (0.55, 0)})  # fmt: skip
    result, _ = search(scripted, n=3, samples=2)
    # Two places are left, each with its C draws.
    assert [before for before, _ in scripted.drawn[6:]] == ["1\n", "1\n", "2\n", "2\n"]
    assert texts(scripted, result) == ["A7", "1\nA1", "2\nA2"]
    assert [len(children) for children in result.steps] == [6, 4]
    assert [(parent, kept) for parent, kept, _, _ in result.steps[1]] == [
        (1, True), (2, True), (1, False), (2, False),
    ]  # fmt: skip


def test_odd_draws_go_to_the_earlier_places(policy: Policy) -> None:
    scripted = Scripted(policy, {
        "": ["1\n", "2\n", "1\n", "2\n", "1\n", "2\n", "1\n", "2\n", "1\n"],
        "1\n": ["A1$"] * 5,
        "2\n": ["A1$"] * 4,
    })  # fmt: skip
    result, _ = search(scripted, n=3, samples=3)
    assert len(scripted.drawn) == 18
    assert sorted(texts(scripted, result)) == ["1\nA1", "2\nA1"]


def test_finished_candidate_loses_its_place_to_better_unfinished_ones(policy: Policy) -> None:
    scripted = Scripted(policy, {
        "": ["A7$", "1\n", "2\n", "3\n"],
        "1\n": ["A1$", "A1$"],
        "2\n": ["A2$", "A2$"],
    }, {"A7$": (0.1, 0), "1\n": (0.8, 0), "2\n": (0.7, 0)})  # fmt: skip
    result, _ = search(scripted, n=2, samples=2)
    assert texts(scripted, result) == ["1\nA1", "2\nA2"]


def test_finished_candidate_outlives_worse_children_of_a_better_parent(policy: Policy) -> None:
    scripted = Scripted(policy, {
        "": ["1\n", "A7$", "1\n", "A7$"],
        "1\n": ["A1$", "A2$"],
    }, {"1\n": (0.9, 0), "A7$": (0.4, 0), "1\nA1$": (0.3, 0), "1\nA2$": (0.2, 0)})  # fmt: skip
    result, _ = search(scripted, n=2, samples=2)
    assert texts(scripted, result) == ["A7", "1\nA1"]


def test_truncated_children_are_kept_apart_and_counted(policy: Policy) -> None:
    cap = len(policy.encode(PROBLEM)) + 6
    scripted = Scripted(policy, {
        "": ["1\n", "123456", "123456", "A1$"],
        "1\n": ["2345", "A3$"],
    }, {"1\n": (0.9, 0), "A1$": (0.8, 0)})  # fmt: skip
    result, cost = search(scripted, n=2, samples=2, max_length=cap)
    assert result.truncated == 3
    assert texts(scripted, result) == ["A1", "1\nA3"]
    assert all(c.finished and not c.truncated for c in result.candidates)
    assert cost.policy_tokens == 2 + 6 + 6 + 3 + 4 + 3


def test_none_finished_counts_as_wrong(policy: Policy) -> None:
    cap = len(policy.encode(PROBLEM)) + 4
    scripted = Scripted(policy, {"": ["1\n", "1\n"], "1\n": ["A2", "A2"]})
    scripted_any: Any = scripted
    session = Session(Tape(), policy, Sampler(max_length=cap), ENGINE)
    session.sampling_engine = lambda *_: scripted_any  # type: ignore[method-assign]
    settings = BeamSettings(2, 1, 0.0, "q/prover", "q/base")
    record = asyncio.run(beam_record(session, scripted_any, settings, "last", "beam", 0, PROBLEM))
    assert record.candidates == [] and record.picked is None
    assert record.answer is None and not record.correct
    assert (record.truncated, record.merged) == (2, 1)


def test_blank_lines_are_sampled_through_in_the_same_step(policy: Policy) -> None:
    scripted = Scripted(policy, {"": ["\n"], "\n": ["\n"], "\n\n": ["1\n"], "\n\n1\n": ["A1$"]})
    result, cost = search(scripted, n=1, samples=1)
    assert texts(scripted, result) == ["\n\n1\nA1"]
    assert result.candidates[0].ends == [4, 7]
    assert cost.policy_tokens == 7


def test_endless_blank_lines_are_given_up(policy: Policy) -> None:
    scripted = Scripted(policy, {"\n" * i: ["\n"] for i in range(40)})
    result, cost = search(scripted, n=1, samples=1)
    assert result.candidates == [] and result.truncated == 1
    assert cost.policy_tokens == 9


def test_children_rank_by_base_value_plus_weighted_advantage(policy: Policy) -> None:
    q = {"": (0.5, 0.4), "1\n": (0.6, 0.4), "2\n": (0.5, 0.9), "1\nA1$": (0.7, 0.7)}
    script = {"": ["1\n", "2\n"], "1\n": ["A1$", "A1$"], "2\n": ["A2$", "A2$"]}

    def best(alpha: float, prover: str = "q/prover") -> tuple[str, float]:
        scripted = Scripted(policy, script, q)
        result, _ = search(scripted, n=1, samples=2, alpha=alpha, prover=prover)
        return texts(scripted, result)[0], result.steps[0][0][2]

    assert best(0.0) == ("1\nA1", 0.6)
    assert best(1.0) == ("2\nA2", pytest.approx(0.5 + (0.9 - 0.4)))
    assert best(0.1) == ("1\nA1", 0.6)
    # Best-of-4 of the base policy: 1 - (1 - Q)^4 on both sides of the step.
    assert best(1.0, "bo4") == ("1\nA1", pytest.approx(0.6 + 0.5**4 - 0.4**4))


def test_advantage_of_a_later_step_is_against_the_state_before_it(policy: Policy) -> None:
    scripted = Scripted(policy, {"": ["1\n"], "1\n": ["A1$"]},
                        {"": (0, 0.2), "1\n": (0, 0.5), "1\nA1$": (0.25, 0.9)})  # fmt: skip
    result, _ = search(scripted, n=1, samples=1, alpha=2.0)
    assert result.candidates[0].score == pytest.approx(0.25 + 2 * (0.9 - 0.5))
    assert result.candidates[0].q["q/prover"] == [0.2, 0.5, 0.9]


def test_ties_go_to_the_earlier_child(policy: Policy) -> None:
    scripted = Scripted(policy, {"": ["3\n", "1\n", "2\n", "4\n"], "3\n": ["A1$"] * 2,
                                 "1\n": ["A1$"] * 2})  # fmt: skip
    result, _ = search(scripted, n=2, samples=2)
    assert texts(scripted, result) == ["3\nA1", "1\nA1"]


def test_prover_that_is_no_head_is_refused(verifier: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prover is 'bo0'; give bo<K> .*q/base, q/prover"):
        beam(config(verifier, tmp_path / "run", prover="bo0"))
