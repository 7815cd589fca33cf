"""The comparison: one sample set serves all rankers, budgets are what beam spent, runs resume."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.engine.vllm import VllmEngine
from pav.policy.policy import PolicyConfig, Sampler
from pav.tasks.tape import Tape
from pav.verifier.checkpoint import load_verifier
from search.compare.command import CompareConfig, Method, compare, manifest
from search.report.data import report_data
from search.run.records import read

SAMPLER = Sampler(max_length=128)


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
            Method("dvts", "dvts", str(folder / "pav.ckpt"), n=[2], score="a"),
            Method("alphallm", "alphallm", str(folder / "pav.ckpt"), n=[2]),
            Method("smc", "smc", str(folder / "pav.ckpt"), n=[2], pick="pav"),
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
    for name in ("compare", "compare_n", "compare_flops", "optimisation"):
        assert (Path(config.output) / f"{name}.png").stat().st_size > 10_000


def test_every_method_names_what_both_models_cost(config: CompareConfig) -> None:
    found = rows(config)
    for row in found:
        policy, verifier, total = (
            float(row[f"{x}_flops"]) for x in ("policy", "verifier", "total")
        )
        assert total == pytest.approx(policy + verifier, rel=2e-3)
        # Two layers of hidden 64: 73728 weights, each worth two FLOPs a token.
        assert policy > 2 * 73_728 * float(row["policy_tokens"])
        assert float(row["policy_prefilled"]) > 0
        separate = row["method"] in ("best", "vote")
        assert (verifier > policy / 10) == separate
        # A fused search pays for three heads and the reference row, votes without a verifier not.
        assert (verifier > 0) == (row["method"] not in ("majority", "other"))
    fused = next(r for r in found if r["method"] == "beam")
    rows_cost = 2 * 64 * 4 * float(fused["policy_tokens"])
    assert float(fused["verifier_flops"]) == pytest.approx(rows_cost, rel=2e-3)


def test_believed_is_the_picks_own_value(config: CompareConfig) -> None:
    records = [
        r
        for seed in (0, 1)
        for r in read(next(Path(config.output).glob(f"beam-*-n2-s{seed}.jsonl")))
    ]
    values = [0.0 if r.picked is None else r.candidates[r.picked].q["q/base"][-1] for r in records]
    (row,) = (r for r in rows(config) if r["method"] == "beam" and r["n"] == "2")
    assert float(row["believed"]) == pytest.approx(np.mean(values), abs=1e-4)
    assert all(r["believed"] == "nan" for r in rows(config) if r["method"] == "majority")


def test_best_of_n_is_also_shown_at_the_flops_of_every_beam(config: CompareConfig) -> None:
    found = rows(config)
    spent = {int(r["n"]): float(r["total_flops"]) for r in found if r["method"] == "beam"}
    matched = [r for r in found if r["flops_matched_to_beam_n"]]
    assert matched and {r["method"] for r in matched} <= {"best", "vote", "majority", "other"}
    for row in matched:
        n, flops = int(row["n"]), float(row["total_flops"])
        budget = spent[int(row["flops_matched_to_beam_n"])]
        assert flops > 0.8 * budget
        assert n == 1 or flops * (n - 1) / n < 1.2 * budget


def test_other_searches_are_compared_too(config: CompareConfig) -> None:
    settings = {r["method"]: json.loads(r["settings"]) for r in rows(config)}
    assert (settings["dvts"]["score"], settings["dvts"]["samples"]) == ("a", 3)
    assert settings["alphallm"]["bonus"] > 0
    assert (settings["smc"]["resampling"], settings["smc"]["pick"]) == ("systematic", "pav")
    for kind in ("dvts", "alphallm", "smc"):
        files = list(Path(config.output).glob(f"{kind}-*-n2-s*.jsonl"))
        assert len(files) == 2
        assert all(r.method == kind and r.n == 2 for f in files for r in read(f))


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
    assert {"doubling", "equal tokens", "equal N"} <= {d["kind"] for d in found}
    assert {d["b"] for d in found if d["kind"] == "equal N"} == {"best"}
    for d in found:
        expected = accuracy[d["a"], d["a_n"]] - accuracy[d["b"], d["b_n"]]
        assert d["difference"] == pytest.approx(expected, abs=2e-4)
        assert d["ci95"][0] <= d["difference"] <= d["ci95"][1]
        assert 0 < d["mcnemar_p"] <= 1


def test_report_shows_what_every_method_picked(config: CompareConfig) -> None:
    assert (Path(config.output) / "report.html").is_file()
    data = report_data(Path(config.output), problems=6, seeds=[0, 1])
    right: dict[tuple[str, int], list[bool]] = {}
    for view in data["views"]:
        problems = data["searches"][view["search"]]["problems"]
        for problem, picked in zip(problems, view["picked"], strict=True):
            candidates = problem["candidates"][: view["n"]]
            own = right.setdefault((view["method"], view["n"]), [])
            own.append(picked >= 0 and candidates[picked]["correct"])
            finished = [c["q"] for c in candidates if c["finished"]]
            assert (picked < 0) == (not finished)
            if view["method"] == "best" and finished:
                assert candidates[picked]["q"] == max(finished)
            if view["method"] in ("beam", "dvts", "alphallm", "smc"):
                assert all(c["step"] is not None for c in candidates)
    accuracy = {(r["method"], int(r["n"])): float(r["accuracy"]) for r in rows(config)}
    assert {key: float(np.mean(v)) for key, v in right.items()} == pytest.approx(accuracy, abs=1e-4)


def test_a_finished_comparison_is_not_run_again_and_another_is_refused(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in Path(config.output).glob("*.jsonl")}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run was searched again")

    monkeypatch.setattr("search.compare.run_searches.beam_record", refuse)
    monkeypatch.setattr("search.compare.best_of_n_results.traces_record", refuse)
    monkeypatch.setattr(VllmEngine, "start", refuse)
    compare(config)
    assert {p.name: p.read_bytes() for p in Path(config.output).glob("*.jsonl")} == before
    # The seconds of the first start are remembered, though nothing was searched by this one.
    assert all(float(r["seconds"]) > 0 for r in rows(config))
    with pytest.raises(UserError, match="seeds"):
        compare(replace(config, seeds=[0]))


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (Method("x", "best_of_n", "orm.ckpt", pick="last"), "pick last reads a Q head, which"),
        (Method("x", "best_of_n", "pav.ckpt", pick="pav", prover="q/no"), "prover is 'q/no'; give"),
        (Method("x", "beam", "pav.ckpt", prover="q/no"), "prover is 'q/no'; give bo<K>"),
        (Method("x", "beam", "pav.ckpt", samples=0), "samples is 0; give at least 1"),
        (Method("x", "beam", "orm.ckpt"), "prover is ''; give"),
        (Method("x", "best_of_n", pick="majority", policy=PolicyConfig("pav:no")), "no shipped"),
    ],
)
def test_last_method_that_cannot_be_searched_is_found_before_the_first_is(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: Method,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(VllmEngine, "start", lambda _: pytest.fail("an engine was started"))
    if last.verifier:
        last = replace(last, verifier=str(Path(config.output).parent / last.verifier))
    methods = [*config.methods[:1], last]
    with pytest.raises(UserError, match=message):
        compare(replace(config, methods=methods, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_run_of_the_first_version_is_resumed(config: CompareConfig, tmp_path: Path) -> None:
    """Its records lack checksums and counts of FLOPs, its manifest the later settings."""
    method = {"name": "beam", "kind": "beam", "verifier": config.methods[0].verifier, "pick": None,
              "alpha": None, "prover": None, "samples": 3, "n": None, "surprise": True,
              "scoring": "auto", "policy": None}  # fmt: skip
    made = replace(config, methods=config.methods[:1], output=str(tmp_path / "run"))
    verifier = load_verifier(str(config.methods[0].verifier))
    old = {"methods": [method], "verifiers": {str(config.methods[0].verifier): verifier.digest},
           "n": [1, 2], "seeds": [0, 1], "problems": 6, "skip": 0, "split": "test",
           "sampler": None, "max_traces": 128}  # fmt: skip
    assert manifest(made, {str(config.methods[0].verifier): verifier.digest}) == old
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(old))
    later = {"policy_requests", "policy_prefilled", "policy_cached", "policy_context",
             "verifier_context", "verifier_logits", "crc"}  # fmt: skip
    for file in Path(config.output).glob("beam-*"):
        if file.suffix == ".jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            kept = [{k: v for k, v in line.items() if k not in later} for line in lines]
            text = "".join(json.dumps(line) + "\n" for line in kept)
        else:
            text = file.read_text()
        (tmp_path / "run" / file.name).write_text(text)
    compare(made)
    found = rows(made)
    assert [r["accuracy"] for r in found] == [
        r["accuracy"] for r in rows(config) if r["method"] == "beam"
    ]
    assert all(r["total_flops"] == "nan" and float(r["policy_tokens"]) > 0 for r in found)
    assert (tmp_path / "run" / "compare_flops.png").exists()


# Stops before it searches, and says so.
WAITING = """
import sys, time
import search.compare.command

def wait(*_):
    print("searching", flush=True)
    time.sleep(600)

search.compare.command.search_results = wait
search.compare.command.main()
"""


def test_second_comparison_in_one_directory_is_refused_until_the_first_is_gone(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": "beam", "verifier": config.methods[0].verifier}
    made = replace(config, output=str(tmp_path / "run"))
    first = subprocess.Popen(
        [sys.executable, "-c", WAITING, "--methods", json.dumps([method]), "--output", made.output],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert first.stdout is not None
        assert "searching\n" in iter(first.stdout.readline, "")
        with pytest.raises(UserError, match=f"is being written by process {first.pid} on .+; wait"):
            compare(made)
    finally:
        first.kill()
        first.wait()

    class Inside(Exception):
        pass

    def inside(*_: Any) -> None:
        raise Inside

    # What was killed had no record yet: another comparison may have its directory.
    monkeypatch.setattr("search.compare.command.search_results", inside)
    with pytest.raises(Inside):
        compare(made)
    assert [p.name for p in Path(made.output).iterdir()] == ["manifest.json"]


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
