"""Choosing alpha and prover: the paper's stages, validation problems alone, one engine load."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.statistics import Interval
from pav.engine.loading import EngineConfig
from pav.engine.vllm import VllmEngine
from pav.policy.policy import Sampler
from pav.tasks.base import Problem, Split
from pav.tasks.tape import Tape
from search.beam import BeamConfig
from search.compare.command import CompareConfig, Method, compare
from search.compare.plan import Selection
from search.compare.run_searches import Comparison
from search.run.records import read
from search.select import COARSE, Choice, SelectConfig, choose, select

ENGINE = EngineConfig(kv_gib=0.02, max_num_seqs=64)
SAMPLER = Sampler(max_length=128)


# -- the procedure, on given accuracies ------------------------------------------------------------


def chosen(
    monkeypatch: pytest.MonkeyPatch, accuracy: Callable[[float, str], float], what: list[Any],
    method: Method | None = None, **how: Any,
) -> tuple[Choice, list[tuple[float, str]]]:  # fmt: skip
    """What is chosen where a beam with (alpha, prover) is right that often, and what was tried."""
    tried: list[tuple[float, str]] = []

    def search_results(comparison: Comparison, method: Method) -> list[Any]:
        assert comparison.config.split == "validation" and method.n == [16]
        assert method.alpha is not None and method.prover is not None
        tried.append((method.alpha, method.prover))
        mean = accuracy(method.alpha, method.prover)
        right_PS = (np.arange(200) < round(200 * mean)).astype(float)[:, None]
        return [SimpleNamespace(accuracy=Interval(mean, mean, mean), correct_PS=right_PS)]

    def problems(split: Split, count: int) -> list[Problem]:
        assert split == "validation"
        return [Problem(str(i), "1+1") for i in range(count)]

    monkeypatch.setattr("search.select.search_results", search_results)
    session: Any = SimpleNamespace(problems=problems)
    card = SimpleNamespace(
        alpha=0.5, heads=["q/base", "q/prover", "orm"], base_head="q/base", prover_head="q/prover"
    )
    verifiers: Any = {"v": SimpleNamespace(card=card)}
    made = method or Method("beam", verifier="v")
    comparison = Comparison(CompareConfig([made], "unused"), verifiers, session, [], Path("/tmp"))
    return choose(comparison, made, what, Selection(**how)), tried


def test_alpha_is_halved_from_ten_until_it_beats_zero_and_then_refined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def accuracy(alpha: float, prover: str) -> float:
        # Better than alpha 0 below 1.8, best at 0.6, under the base policy as prover.
        assert prover == "bo1"
        return 0.5 + 0.1 * (1 - abs(alpha - 0.6)) if 0 < alpha < 1.8 else 0.5

    found, tried = chosen(monkeypatch, accuracy, ["alpha"])
    assert tried[:5] == [(a, "bo1") for a in (0.0, 10.0, 5.0, 2.5, 1.25)]
    assert [a for a, _ in tried[5:]] == pytest.approx([0.125 * i for i in range(11)])
    assert (found.alpha, found.prover) == (0.625, None)


def test_prover_is_chosen_with_the_chosen_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"bo4": 0.7, "q/prover": 0.6}

    def accuracy(alpha: float, prover: str) -> float:
        if prover == "bo1":
            return 0.5 + (alpha == 0.3)
        assert alpha == 0.3
        return table.get(prover, 0.4) + 1

    found, tried = chosen(monkeypatch, accuracy, ["alpha", "K"], alphas=[0.0, 0.3], ks=[8, 4])
    assert tried == [(0.0, "bo1"), (0.3, "bo1"), (0.3, "bo4"), (0.3, "bo8"), (0.3, "q/prover")]
    assert (found.alpha, found.prover) == (0.3, "bo4")
    # Chosen alone, K takes the alpha that is set, or the verifier's.
    fixed = Method("beam", verifier="v", alpha=0.3)
    alone, _ = chosen(monkeypatch, accuracy, ["K"], fixed, ks=[4, 8])
    assert (alone.alpha, alone.prover) == (None, "bo4")


def test_tie_keeps_the_default_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found, tried = chosen(monkeypatch, lambda alpha, prover: 0.5, ["alpha", "K"])
    assert (found.alpha, found.prover) == (0.5, "q/prover")
    # Where no alpha beats 0 the coarse stage ends at its last.
    assert [a for a, _ in tried[1:7]] == list(COARSE)
    assert max(a for a, _ in tried[7:18]) == COARSE[-1]
    alpha, prover = found.notes
    assert alpha.startswith("alpha: tie: default kept (0.5; as accurate: 0.0, 0.03125, ")
    assert prover.startswith("prover: tie: default kept (q/prover; as accurate: bo1, bo2, ")
    # A default among the best is kept, too; where it is not the smallest of them is taken.
    best = {0.25, 0.5}
    some = [0.0, 0.25, 0.5, 1.0]
    found, _ = chosen(monkeypatch, lambda a, _: 0.4 + (a in best) / 10, ["alpha"], alphas=some)
    assert (found.alpha, found.notes) == (
        0.5, ("alpha: tie: default kept (0.5; as accurate: 0.25, 0.5)",),
    )  # fmt: skip
    best = {0.25, 1.0}
    found, _ = chosen(monkeypatch, lambda a, _: 0.4 + (a in best) / 10, ["alpha"], alphas=some)
    assert (found.alpha, found.notes) == (0.25, ("alpha: tie: the first of 0.25, 1.0 is taken",))


def test_choice_says_whether_it_can_be_told_from_the_second_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of(gain: float) -> str:
        table = {0.0: 0.3, 0.5: 0.4, 1.0: 0.4 + gain}
        found, _ = chosen(monkeypatch, lambda a, _: table[a], ["alpha"], alphas=list(table))
        assert found.alpha == 1.0
        return found.notes[0]

    assert of(0.2).startswith("alpha: ahead of 0.5, the second best, by 0.200 [0.1")
    assert of(0.005).startswith("alpha: not distinguishable from 0.5, the second best, by 0.005 [0")


# -- on a tiny model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verifier(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path_factory: pytest.TempPathFactory
) -> str:
    path = tmp_path_factory.mktemp("select") / "pav.ckpt"
    make_verifier(tiny_model("llama"), path, heads=("q/base", "q/prover", "orm"), sampler=SAMPLER)
    return str(path)


@pytest.fixture
def no_test_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Tape.problems

    def problems(self: Tape, split: Split) -> Iterator[Problem]:
        assert split == "validation", f"{split} problems were read"
        return plain(self, split)

    monkeypatch.setattr(Tape, "problems", problems)


HOW = Selection(n=2, problems=3, alphas=[0.0, 0.5], ks=[1, 2])


@pytest.mark.usefixtures("no_test_problems")
def test_choice_is_made_without_test_problems_and_search_beam_takes_it(
    verifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SelectConfig(verifier, str(tmp_path / "run"), selection=HOW, engine=ENGINE)
    select(config)
    found = yaml.safe_load((tmp_path / "run" / "choice.yaml").read_text())
    with (tmp_path / "run" / "select.csv").open(newline="") as stream:
        tried = list(csv.DictReader(stream))
    assert [(t["stage"], t["prover"]) for t in tried] == [
        ("alpha", "bo1"), ("alpha", "bo1"), ("K", "bo1"), ("K", "bo2"), ("K", "q/prover"),
    ]  # fmt: skip
    provers = [(float(t["accuracy"]), t["prover"]) for t in tried if t["stage"] == "K"]
    best = [p for a, p in provers if a == max(provers)[0]]
    # Of equals the verifier's own.
    assert found["prover"] == ("q/prover" if "q/prover" in best else best[0])
    taken: list[BeamConfig] = []
    argv = ["--config", str(tmp_path / "run" / "choice.yaml"), "--verifier", verifier]
    run(taken.append, BeamConfig, "search.beam", argv)
    assert (taken[0].alpha, taken[0].prover) == (found["alpha"], found["prover"])
    # Equal searches are searched once, and a repeat searches nothing.
    runs = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.jsonl")}
    assert len(runs) == 4
    # So many workers make the same searches of the same problems.
    two = replace(config, output=str(tmp_path / "two"), workers=2, concurrency=1)
    select(two)
    assert yaml.safe_load((tmp_path / "two" / "choice.yaml").read_text()) == found
    searched = [
        {p.name: {r.problem_id for r in read(p)} for p in (tmp_path / name).glob("*.jsonl")}
        for name in ("run", "two")
    ]
    assert searched[0] == searched[1] and searched[0].keys() == runs.keys()

    async def never(*_: Any) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr("search.compare.run_searches.beam_record", never)
    with monkeypatch.context() as patch:
        patch.setattr(VllmEngine, "start", lambda _: pytest.fail("an engine was started"))
        select(config)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.jsonl")} == runs
    with pytest.raises(UserError, match="another selection"):
        select(replace(config, selection=replace(HOW, problems=4)))


def test_comparison_chooses_on_validation_and_tests_with_the_choice_in_one_engine_load(
    verifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = VllmEngine.start

    def counting(engine: VllmEngine) -> None:
        if engine._engine is None:
            loaded.append(engine.model)
        load(engine)

    monkeypatch.setattr(VllmEngine, "start", counting)
    compare(
        CompareConfig(
            [
                Method("chosen", verifier=verifier),
                Method("fixed", verifier=verifier, alpha=0.25, prover="bo8"),
                Method("half", verifier=verifier, prover="bo8", pick="min"),
            ],
            str(tmp_path / "run"),
            n=[1],
            problems=2,
            select=["alpha", "K"],
            selection=HOW,
            engine=ENGINE,
        )
    )
    assert len(loaded) == 1
    with (tmp_path / "run" / "compare.csv").open(newline="") as stream:
        found = {r["method"]: json.loads(r["settings"]) for r in csv.DictReader(stream)}
    first, second = (
        yaml.safe_load((tmp_path / "run" / "select" / i / "choice.yaml").read_text()) for i in "01"
    )
    assert {k: found["chosen"][k] for k in ("alpha", "prover")} == first
    assert (found["fixed"]["alpha"], found["fixed"]["prover"]) == (0.25, "bo8")
    # What a method sets is left alone.
    assert set(second) == {"alpha"} and found["half"]["prover"] == "bo8"
    assert found["half"]["alpha"] == second["alpha"]
    test = {p.id for p, _ in zip(Tape().problems("test"), range(2), strict=False)}
    validation = {p.id for p, _ in zip(Tape().problems("validation"), range(3), strict=False)}
    for file in (tmp_path / "run").glob("*.jsonl"):
        assert {r.problem_id for r in read(file)} == test
    for file in (tmp_path / "run" / "select").glob("*/*.jsonl"):
        assert {r.problem_id for r in read(file)} == validation


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"selection.ks is \[0\]"):
        Selection(ks=[0])
    with pytest.raises(UserError, match=r"selection.alphas is \[\]"):
        Selection(alphas=[])
    with pytest.raises(UserError, match="select is empty"):
        SelectConfig("v", "o", select=[])
    with pytest.raises(UserError, match="workers is 0; give 1 or more"):
        SelectConfig("v", "o", workers=0)


def test_command_line_names_what_is_to_be_chosen() -> None:
    taken: list[Any] = []
    method = '[{"name": "beam", "verifier": "v"}]'
    argv = ["--methods", method, "--output", "o", "--select", "[alpha,K]", "--selection.n", "4"]
    run(taken.append, CompareConfig, "search.compare", argv)
    assert taken[0].select == ["alpha", "K"]
    assert taken[0].selection == Selection(n=4)
    with pytest.raises(SystemExit):
        run(taken.append, CompareConfig, "search.compare", [*argv[:-3], "[beta]"])
