"""What a command prints as the next one to give is a command that works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_gen.store import read_manifest
from pav.engine.loading import EngineConfig
from pav.policy.policy import Sampler
from pav.tasks.tape import Tape
from pav.verifier.checkpoint import load_verifier
from search.compare.command import CompareConfig, Method, compare
from search.compare.plan import Selection
from search.run.records import read
from search.select import SelectConfig, select
from tests.following import follow, printed
from tests.pav.label_runs import write_labels


def only(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The one command that was printed."""
    (command,) = printed(capsys.readouterr().out)
    return command


def test_printed_commands_lead_from_a_new_policy_to_its_searches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    follow(["pav.sft", "--output", "my policy", "--init", "pav:base", "--steps", "1", "--batch",
            "2", "--lr", "1e-7", "--lr_rest", "1e-7", "--eval_problems", "0",
            "--task.sft_short_cuts", "0.3"])  # fmt: skip
    command = only(capsys)
    # An own model asks for its task, settings included.
    assert command[:3] == ["data_gen.rollouts", "--policy", "my policy"]
    follow(command, "--problems", "10", "--validation_problems", "8", "--n_traces", "3",
           "--ignore_warnings", "true", "--engine.kv_gib", "0.05")  # fmt: skip
    command = only(capsys)
    assert command[0] == "pav.train" and "--trunk" not in command
    follow(command, "--max_epochs", "2")
    card = load_verifier("runs/pav.ckpt").card
    assert card.trunk == card.policy["model"] == "my policy" and card.frozen
    assert card.task["init_args"]["sft_short_cuts"] == 0.3
    command = only(capsys)
    follow(command, "--problems", "3", "--n", "2", "--engine.kv_gib", "0.05")
    records = read(next(Path("runs/search").glob("*/beam.jsonl")))
    # The policy as its own trunk needs no second engine.
    assert [r.settings["scoring"] for r in records] == ["fused"] * 3
    command = only(capsys)
    with pytest.raises(SystemExit, match="0"):
        follow(command)
    assert command[0] == "search.compare" and "usage: search.compare" in capsys.readouterr().out


def test_printed_command_does_not_name_a_checkpoint_that_is_there(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    first = write_labels(Path("runs/a b"), model, train_problems=12, validation_problems=8)
    second = write_labels(Path("runs/two"), model, train_problems=12, validation_problems=8)
    follow(["data_gen.merge", first, second, "--output", "runs/merged"])
    assert only(capsys)[-2:] == ["--output", "runs/pav.ckpt"]
    Path("runs/pav.ckpt").touch()
    follow(["data_gen.likelihood", "runs/merged"])
    show, train = printed(capsys.readouterr().out)
    follow(show)
    assert "lik/base" in capsys.readouterr().out
    follow(train, "--max_epochs", "1")
    assert "lik/base" in load_verifier("runs/pav_2.ckpt").card.heads


def test_printed_training_on_labels_of_others_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"{i}+{i}", "completions": [f"{i}+{i}={2 * i}", f"A{2 * i}"],
         "labels": [True, bool(i % 3)]}
        for i in range(2, 99)
    ]  # fmt: skip
    Path("prm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    follow(["data_gen.import_labels", "--format", "trl", "--data", "prm.jsonl", "--policy",
            "pav:base", "--output", "runs/labels"])  # fmt: skip
    assert read_manifest(Path("runs/labels"))["sampler"]["max_length"] == 2048
    follow(only(capsys), "--max_epochs", "1")
    assert load_verifier("runs/pav.ckpt").card.trunk == "pav:base"


@pytest.fixture
def verifiers(tiny_model: Callable[..., Path], make_verifier: Any, tmp_path: Path) -> Path:
    """A directory with a verifier and its ORM."""
    sampler = Sampler(max_length=96)
    heads = ("q/base", "q/prover", "orm")
    make_verifier(tiny_model("llama"), tmp_path / "pav.ckpt", heads=heads, sampler=sampler)
    make_verifier(tiny_model("llama"), tmp_path / "orm.ckpt", heads=("orm",), sampler=sampler)
    return tmp_path


def test_searches_that_comparison_and_choice_print_run(
    verifiers: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What random models sample is often cut, which ends a search with exit code 2.
    monkeypatch.setattr("search.run.session.check_truncation", lambda *_: None)
    device = EngineConfig(kv_gib=0.02, max_num_seqs=32)
    orm, pav = str(verifiers / "orm.ckpt"), str(verifiers / "pav.ckpt")
    methods = [Method("best", "best_of_n", orm, pick="orm"), Method("beam", verifier=pav)]
    compare(CompareConfig(methods, str(verifiers / "run"), n=[1], problems=2, engine=device))
    select(SelectConfig(pav, str(verifiers / "select"), select=["K"], engine=device,
                        selection=Selection(n=1, problems=2, ks=[1, 2])))  # fmt: skip
    for command in printed(capsys.readouterr().out):
        small = ["--n", "1", "--problems", "2", "--engine.kv_gib", "0.02"]
        follow(command, *small, "--output", str(verifiers / f"beam-{len(command)}"))
    found = sorted(p.parent.name for p in verifiers.glob("beam-*/beam.jsonl"))
    assert len(found) == 2
    assert Tape().fingerprint == load_verifier(pav).card.task_fingerprint
