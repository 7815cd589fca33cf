"""The comparison: one sample set serves all rankers, budgets are what beam spent, runs resume."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pav.engine import EngineConfig
from pav.errors import UserError
from pav.policy import PolicyConfig, Sampler
from pav.tasks.tape import Tape
from search.compare import CompareConfig, Method, compare
from search.records import read

SAMPLER = Sampler(max_length=56)


@pytest.fixture(scope="module")
def config(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path_factory: pytest.TempPathFactory
) -> CompareConfig:
    """A finished comparison of random verifiers on a random policy."""
    folder = tmp_path_factory.mktemp("compare")
    model = tiny_model("llama")
    make_verifier(model, folder / "pav.ckpt", heads=("q/base", "q/prover", "orm"), sampler=SAMPLER)
    make_verifier(model, folder / "orm.ckpt", heads=("orm",), sampler=SAMPLER)
    made = CompareConfig(
        methods=[
            Method("beam", verifier=str(folder / "pav.ckpt")),
            Method("best", "best_of_n", str(folder / "orm.ckpt"), pick="orm"),
            Method("vote", "best_of_n", str(folder / "orm.ckpt"), pick="orm_vote"),
            Method("majority", "best_of_n", pick="majority"),
            Method("other", "best_of_n", pick="majority", policy=PolicyConfig(str(model))),
        ],
        output=str(folder / "run"),
        n=[1, 2],
        seeds=[0, 1],
        problems=6,
        engine=EngineConfig(kv_gib=0.02, max_num_seqs=64),
    )
    compare(made)
    return made


def rows(config: CompareConfig) -> list[dict[str, str]]:
    with (Path(config.output) / "compare.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_method_is_there_at_every_n_and_at_the_tokens_of_every_beam(
    config: CompareConfig,
) -> None:
    found = rows(config)
    spent = {int(r["n"]): float(r["policy_tokens"]) for r in found if r["method"] == "beam"}
    assert set(spent) == {1, 2}
    for method in ("best", "vote", "majority", "other"):
        own = [r for r in found if r["method"] == method]
        assert {1, 2} <= {int(r["n"]) for r in own}
        for width, tokens in spent.items():
            (row,) = [r for r in own if r["matched_to_beam_n"] == str(width)]
            one = [r for r in own if int(r["n"]) == int(row["n"]) - 1]
            # Rounded up: one trace fewer would be under the budget (up to sampling noise).
            assert float(row["policy_tokens"]) > 0.8 * tokens
            assert not one or float(one[0]["policy_tokens"]) < 1.2 * tokens
    assert (Path(config.output) / "compare.png").stat().st_size > 10_000


def test_smaller_sets_are_the_start_of_larger_ones(config: CompareConfig) -> None:
    files = sorted(Path(config.output).glob("samples-*.jsonl"))
    by_count = {len(read(f)[0].candidates): f for f in files if "s0" in f.name}
    small, large = (read(by_count[c]) for c in sorted(by_count)[:2])
    for a, b in zip(
        sorted(small, key=lambda r: r.problem_id),
        sorted(large, key=lambda r: r.problem_id),
        strict=True,
    ):
        assert [c.ids for c in a.candidates] == [c.ids for c in b.candidates[: len(a.candidates)]]


def test_paired_differences_are_those_of_the_records(config: CompareConfig) -> None:
    found = json.loads((Path(config.output) / "compare.json").read_text())
    accuracy = {(r["method"], int(r["n"])): float(r["accuracy"]) for r in rows(config)}
    assert {d["kind"] for d in found} == {"doubling", "equal tokens"}
    for d in found:
        expected = accuracy[d["a"], d["a_n"]] - accuracy[d["b"], d["b_n"]]
        assert d["difference"] == pytest.approx(expected, abs=2e-4)
        assert d["ci95"][0] <= d["difference"] <= d["ci95"][1]


def test_a_finished_comparison_is_not_run_again_and_another_is_refused(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in Path(config.output).glob("*.jsonl")}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run was searched again")

    monkeypatch.setattr("search.compare.beam_record", refuse)
    monkeypatch.setattr("search.compare.traces_record", refuse)
    compare(config)
    assert {p.name: p.read_bytes() for p in Path(config.output).glob("*.jsonl")} == before
    # The seconds of the first start are remembered, though nothing was searched by this one.
    assert all(float(r["seconds"]) > 0 for r in rows(config))
    with pytest.raises(UserError, match="seeds"):
        compare(replace(config, seeds=[0]))


def test_seconds_of_a_run_that_died_are_unknown(config: CompareConfig, tmp_path: Path) -> None:
    copied = shutil.copytree(config.output, tmp_path / "run")
    for clock in copied.glob("beam-*-n1-s0.seconds.json"):
        clock.unlink()
    compare(replace(config, output=str(copied)))
    found = {(r["method"], int(r["n"])): float(r["seconds"])
             for r in rows(replace(config, output=str(copied)))}  # fmt: skip
    assert np.isnan(found["beam", 1]) and found["beam", 2] > 0


def test_skipped_problems_are_left_out(config: CompareConfig, tmp_path: Path) -> None:
    made = replace(config, output=str(tmp_path / "run"), skip=4, problems=3, n=[1], seeds=[0])
    compare(made)
    found = {r.problem_id for r in read(next(Path(made.output).glob("beam-*.jsonl")))}
    expected = islice(Tape().problems("test"), 4, 7)
    assert found == {p.id for p in expected}


def test_accuracy_counts_every_problem(config: CompareConfig) -> None:
    records = read(next(Path(config.output).glob("beam-*-n2-s0.jsonl")))
    assert len(records) == config.problems
    assert np.mean([r.correct for r in records if r.picked is None] or [0.0]) == 0.0
