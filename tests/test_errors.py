"""What a user gets wrong is one line that names the thing and the fix, with exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_gen.config import RolloutsConfig
from data_gen.rollouts import rollouts
from pav.cli.run import run
from pav.core.lock import LOCK, Lock, beside
from pav.engine.vllm import VllmEngine
from pav.train.command import TrainConfig, train
from pav.train.sft import sft
from pav.train.sft_config import SftConfig
from search.beam import BeamConfig, beam
from search.best_of_n import BestOfNConfig, best_of_n
from search.serve.command import ServeConfig, serve
from search.smc import SmcConfig, smc

COMMANDS: dict[str, tuple[Any, type]] = {
    "data_gen.rollouts": (rollouts, RolloutsConfig),
    "pav.train": (train, TrainConfig),
    "pav.sft": (sft, SftConfig),
    "search.beam": (beam, BeamConfig),
    "search.best_of_n": (best_of_n, BestOfNConfig),
    "search.smc": (smc, SmcConfig),
    "search.serve": (serve, ServeConfig),
}
TAPE = ["--task", "Tape"]
SMALL = [*TAPE, "--problems", "2", "--validation_problems", "2", "--n_traces", "2",
         "--sampler.max_length", "40", "--engine.kv_gib", "0.02"]  # fmt: skip


@dataclass(frozen=True)
class World:
    """What is right; every test gets one thing wrong."""

    policy: str
    chat: str
    labels: str
    verifier: str
    orm: str


@pytest.fixture(scope="module")
def world(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path_factory: pytest.TempPathFactory
) -> World:
    root = tmp_path_factory.mktemp("world")
    policy, chat = tiny_model("llama"), tiny_model("llama", "chat")
    made = ["--policy", str(policy), "--output", str(root / "labels"), *SMALL]
    run(rollouts, RolloutsConfig, "data_gen.rollouts", made)
    make_verifier(policy, root / "pav.ckpt")
    make_verifier(policy, root / "other.ckpt", heads=("orm",))
    return World(str(policy), str(chat), str(root / "labels"), str(root / "pav.ckpt"),
                 str(root / "other.ckpt"))  # fmt: skip


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused before an engine is started; returns its one line."""

    def command(name: str, *arguments: str) -> str:
        function, config = COMMANDS[name]
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(VllmEngine, "start", lambda _: pytest.fail("an engine was started"))
            run(function, config, name, arguments)
        printed = capsys.readouterr().err
        assert stopped.value.code == 2, printed
        errors = [line for line in printed.splitlines() if "error:" in line]
        assert len(errors) == 1 and "Traceback" not in printed, printed
        assert errors[0] == printed.splitlines()[-1]
        assert errors[0].startswith(f"{name}: error: ")
        return errors[0].removeprefix(f"{name}: error: ")

    return command


@pytest.mark.parametrize("command", ["search.beam", "search.best_of_n"])
def test_missing_or_foreign_checkpoint(
    refused: Callable[..., str], command: str, tmp_path: Path
) -> None:
    said = refused(command, "--verifier", "runs/none.ckpt")
    assert said.startswith("no verifier checkpoint at 'runs/none.ckpt'; train one with pav.train ")
    (tmp_path / "foreign.ckpt").write_text("not a checkpoint")
    said = refused(command, "--verifier", str(tmp_path / "foreign.ckpt"))
    assert "foreign.ckpt' is not a verifier checkpoint (" in said
    assert "give a file that pav.train wrote" in said
    assert "no shipped verifier 'pav:none'; there are" in refused(command, "--verifier", "pav:none")


def test_verifier_of_the_other_recipe(refused: Callable[..., str], world: World) -> None:
    said = refused("search.beam", "--verifier", world.orm)
    assert "is a verifier of recipe 'orm'; this needs 'pav'" in said
    said = refused("search.beam", "--verifier", world.verifier, "--baseline", "orm",
                   "--baseline_verifier", world.verifier)  # fmt: skip
    assert "is a verifier of recipe 'pav'; this needs 'orm'" in said
    said = refused("search.best_of_n", "--verifier", world.orm, "--pick", "vote")
    assert "pick vote reads a Q head, which" in said and "choose orm, orm_vote or majority" in said


def test_baseline_that_is_not_there(
    refused: Callable[..., str], world: World, tmp_path: Path
) -> None:
    shutil.copy(world.verifier, tmp_path / "pav.ckpt")
    said = refused("search.beam", "--verifier", str(tmp_path / "pav.ckpt"), "--baseline", "orm")
    assert "no ORM baseline beside" in said
    assert "train one with pav.train --recipe orm, or name it with --baseline_verifier" in said


def test_what_does_not_fit_the_verifier(
    refused: Callable[..., str], world: World, tmp_path: Path
) -> None:
    start = ["--verifier", world.verifier]
    out = ["--output", str(tmp_path / "run")]
    assert "prover is 'q/no'; give bo<K>" in refused("search.beam", *start, "--prover", "q/no")
    assert "head is 'q/no'; the verifier has" in refused("search.smc", *start, "--head", "q/no")
    said = refused("search.best_of_n", "--verifier", world.orm, "--pick", "pav", *out)
    assert "pick pav reads a Q head, which" in said
    serving = [*start, "--port", "0"]
    assert "prover is 'q/no'; give bo<K>" in refused("search.serve", *serving, "--prover", "q/no")
    said = refused("search.serve", *serving, "--orm", world.verifier)
    assert "is a verifier of recipe 'pav'; this needs 'orm'" in said
    (tmp_path / "none.jsonl").write_text('{"question": "1+1?", "answer": "2", "split": "train"}\n')
    said = refused("search.best_of_n", "--pick", "majority", "--policy", world.policy, *out,
                   "--task.data", str(tmp_path / "none.jsonl"))  # fmt: skip
    assert "leaves no problem for the test split (1 problems in all" in said
    assert not (tmp_path / "run").exists()


def test_chat_prompt_without_a_chat_template(
    refused: Callable[..., str], world: World, tmp_path: Path
) -> None:
    chat = ["--policy", world.policy, "--policy.prompt.chat", "true"]
    for command in (
        ["data_gen.rollouts", *chat, "--task", "Tape", "--output", str(tmp_path / "labels")],
        ["search.best_of_n", *chat, "--task", "Tape", "--pick", "majority", "--output",
         str(tmp_path / "run")],
        ["search.beam", "--verifier", world.verifier, *chat],
        ["pav.train", "--labels", f"[{world.labels}]", "--trunk", world.policy, "--prompt.chat",
         "true", "--output", str(tmp_path / "pav.ckpt")],
        ["pav.sft", "--init", world.policy, "--prompt.chat", "true", "--output",
         str(tmp_path / "sft")],
    ):  # fmt: skip
        said = refused(*command)
        assert "prompt.chat is true, but the tokenizer " in said and "has no chat template" in said
    assert {p.name for p in tmp_path.iterdir()} <= {"sft"}


def test_finished_label_run_is_printed_again_without_an_engine(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(VllmEngine, "start", lambda _: pytest.fail("an engine was started"))
    made = ["--policy", world.policy, "--output", world.labels, *SMALL]
    run(rollouts, RolloutsConfig, "data_gen.rollouts", made)
    said = capsys.readouterr()
    assert f" rollouts in {world.labels}" in said.out and "next: pav.train" in said.out
    assert "2 train problems, fewer than 50: figures of so few say little" in said.err


def test_missing_policy(refused: Callable[..., str], world: World, tmp_path: Path) -> None:
    out = ["--output", str(tmp_path / "out")]
    said = refused("data_gen.rollouts", "--policy", "./nowhere", *TAPE, *out)
    assert said.startswith("no model at './nowhere' (no config.json there); give a transformers")
    said = refused("data_gen.rollouts", "--policy", "pav:nothing", *out)
    assert said.startswith("no shipped model 'pav:nothing'; there are ")
    said = refused("pav.train", "--labels", f"[{world.labels}]", "--trunk", "./nowhere",
                   "--output", str(tmp_path / "pav.ckpt"))  # fmt: skip
    assert said.startswith("no model at './nowhere'")
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_do_not_match(
    refused: Callable[..., str], world: World, tmp_path: Path
) -> None:
    said = refused("data_gen.rollouts", "--policy", world.policy, "--prover", world.chat,
                   *TAPE, "--output", str(tmp_path / "labels"))  # fmt: skip
    assert said.startswith(f"prover {world.chat!r} has another tokenizer than policy ")
    assert said.endswith("choose a prover of the same tokenizer")
    said = refused("pav.train", "--labels", f"[{world.labels}]", "--trunk", world.chat,
                   "--output", str(tmp_path / "pav.ckpt"))  # fmt: skip
    assert said.startswith(f"trunk {world.chat!r} has another tokenizer than the labels' policy")
    assert said.endswith("use a trunk of the same tokenizer")
    said = refused("search.beam", "--verifier", world.verifier, "--policy", world.chat)
    assert said.startswith(f"policy {world.chat!r} has another tokenizer than verifier ")
    assert "or train a verifier for this one" in said


def test_labels_made_under_another_setting(
    refused: Callable[..., str], world: World, tmp_path: Path
) -> None:
    out = ["--trunk", world.policy, "--output", str(tmp_path / "pav.ckpt")]
    said = refused("pav.train", "--labels", f"[{world.labels}]", *out,
                   "--task", "pav.tasks.tape.Tape", "--task.n_ops", "5")  # fmt: skip
    assert "were made for another setting of the task" in said
    assert said.endswith("give the same --task settings")
    for key in ("task", "tokenizer", "sampler", "policy_fingerprint"):
        other = tmp_path / key
        shutil.copytree(world.labels, other)
        manifest = json.loads((other / "manifest.json").read_text())
        manifest[key] = {"temperature": 0.7} if key == "sampler" else "other"
        (other / "manifest.json").write_text(json.dumps(manifest))
        said = refused("pav.train", "--labels", f"[{world.labels},{other}]", *out)
        assert f"disagree on {key}: " in said and said.endswith("train on runs of one setting")


def test_delimiter_that_the_tokenizer_never_produces(
    refused: Callable[..., str], world: World, tmp_path: Path
) -> None:
    said = refused("data_gen.rollouts", "--policy", world.policy, "--output", str(tmp_path / "x"),
                   *TAPE, "--task.step_rule.delimiter", "§§")  # fmt: skip
    assert said.startswith("step_rule.delimiter '§§' is in no single token of the tokenizer ")
    assert "choose a delimiter that the tokenizer produces" in said
    assert not (tmp_path / "x").exists()


def test_empty_data(refused: Callable[..., str], world: World, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n\n")
    data = ["--policy", world.policy, "--output", str(tmp_path / "labels"), "--task.data"]
    said = refused("data_gen.rollouts", *data, str(tmp_path / "x.jsonl"))
    assert "x.jsonl' holds no problems; give another file" in said
    said = refused("data_gen.rollouts", *data, str(tmp_path / "none.jsonl"))
    assert "none.jsonl' is no file; give the path of a .jsonl" in said
    rows = [json.dumps({"question": f"{i}+1?", "answer": i + 1}) for i in range(100)]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    said = refused("data_gen.rollouts", *data, str(tmp_path / "x.jsonl"), "--skip", "1000",
                   "--validation_problems", "0")  # fmt: skip
    assert "has no training problems after skip=1000; check task.data and problems" in said
    assert not (tmp_path / "labels").exists()
    out = ["--trunk", world.policy, "--output", str(tmp_path / "pav.ckpt")]
    said = refused("pav.train", "--labels", "[]", *out)
    assert said.startswith("labels is empty; give at least one directory")
    said = refused("pav.train", "--labels", f"[{tmp_path}]", *out)
    assert said.endswith(f"has no manifest.json; run data_gen.rollouts --output {tmp_path} first")
    unsealed = tmp_path / "unsealed"
    unsealed.mkdir()
    shutil.copy(Path(world.labels) / "manifest.json", unsealed)
    said = refused("pav.train", "--labels", f"[{unsealed}]", *out)
    assert said.endswith("hold no traces; let data_gen.rollouts finish")


def test_training_without_validation_problems(
    refused: Callable[..., str], world: World, tmp_path: Path
) -> None:
    made = ["--policy", world.policy, "--output", str(tmp_path / "labels"), *SMALL]
    run(rollouts, RolloutsConfig, "data_gen.rollouts", [*made, "--validation_problems", "0"])
    said = refused("pav.train", "--labels", f"[{tmp_path / 'labels'}]", "--trunk", world.policy,
                   "--output", str(tmp_path / "pav.ckpt"))  # fmt: skip
    assert "0 validation traces" in said
    assert said.endswith("both are needed: raise problems or validation_problems")


@pytest.mark.parametrize("command", ["data_gen.rollouts", "search.beam", "search.best_of_n"])
def test_output_that_holds_something_else_is_left_alone(
    refused: Callable[..., str], world: World, tmp_path: Path, command: str
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    start = (
        ["--policy", world.policy, *TAPE] if command[0] == "d" else ["--verifier", world.verifier]
    )
    said = refused(command, *start, "--output", str(tmp_path))
    assert f"output {str(tmp_path)!r} is not empty" in said and "'thesis.tex'" in said
    assert "choose another" in said
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_run_of_another_configuration_is_refused_naming_what_changed(
    refused: Callable[..., str], world: World
) -> None:
    made = ["--policy", world.policy, "--output", world.labels, *SMALL]
    said = refused("data_gen.rollouts", *made, "--n_mc", "2", "--sampler.temperature", "0.5")
    assert (
        "was made with another n_mc, sampler (n_mc: 1 there, 2 now); restore it, or choose" in said
    )


def test_checkpoint_or_model_that_is_there_is_never_overwritten(
    refused: Callable[..., str], world: World
) -> None:
    said = refused("pav.train", "--labels", f"[{world.labels}]", "--output", world.verifier)
    assert said == f"output {world.verifier!r} exists; choose another name or remove it"
    said = refused("pav.sft", "--output", world.policy)
    assert said == f"output {world.policy!r} already holds a model; choose another directory"
    said = refused("pav.train", "--labels", f"[{world.labels}]", "--output", "runs/pav")
    assert said == "output is 'runs/pav'; give a file name ending in .ckpt"


@pytest.mark.parametrize(
    "command",
    [
        "data_gen.rollouts",
        "search.beam",
        "pav.train",
        "pav.sft",
    ],
)
def test_output_that_cannot_be_written_is_found_before_the_work(
    refused: Callable[..., str], world: World, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("")
    start = {
        "data_gen.rollouts": ["--policy", world.policy, *TAPE],
        "search.beam": ["--verifier", world.verifier],
        "pav.train": [
            "--labels",
            f"[{world.labels}]",
            "--trunk",
            world.policy,
            "--max_epochs",
            "1",
        ],
        "pav.sft": ["--steps", "1"],
    }[command]
    output = str(tmp_path / "file" / "run") + (".ckpt" if command == "pav.train" else "")
    said = refused(command, *start, "--output", output)
    fix = {"pav.train": "cannot be written there; choose another place"}
    assert f"output {output!r} " in said
    assert fix.get(command, "is not writable (Not a directory); choose another") in said


@pytest.mark.parametrize(
    "command", ["data_gen.rollouts", "search.beam", "search.best_of_n", "pav.sft", "pav.train"]
)
def test_output_that_another_command_writes_is_refused(
    refused: Callable[..., str], world: World, tmp_path: Path, command: str
) -> None:
    output = tmp_path / ("pav.ckpt" if command == "pav.train" else "run")
    start = {
        "data_gen.rollouts": ["--policy", world.policy, "--task", "Tape"],
        "pav.train": ["--labels", f"[{world.labels}]"],
        "pav.sft": [],
    }.get(command, ["--verifier", world.verifier])
    with Lock(beside(output) if command == "pav.train" else output / LOCK, output):
        said = refused(command, *start, "--output", str(output))
    assert said.startswith(f"output {str(output)!r} is being written by process {os.getpid()} on ")
    assert said.endswith("wait for it or choose another output")
    # Nothing of the refused command is left.
    assert not output.exists() or not any(output.iterdir())


@pytest.mark.parametrize(
    "trunk",
    [
        "trunk",
        "./models/trunk",
        pytest.param(
            "models/trunk",
            marks=pytest.mark.xfail(strict=True, reason="such a policy is looked for on the hub"),
        ),
    ],
)
def test_trunk_that_moved(
    refused: Callable[..., str], world: World, make_verifier: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, trunk: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.policy, trunk)
    make_verifier(trunk, tmp_path / "pav.ckpt")
    Path(trunk).rename("moved")
    elsewhere = ["--verifier", "pav.ckpt", "--policy", world.policy]
    said = refused("search.beam", *elsewhere)
    assert said == (f"the trunk of 'pav.ckpt' is not at {trunk!r} any more; name its new place "
                    "with --trunk")  # fmt: skip
    # Where the policy is the trunk, it moved, too.
    said = refused("search.beam", "--verifier", "pav.ckpt")
    assert f"the policy of verifier 'pav.ckpt' is not at {trunk!r} any more" in said
    assert "name its new place with --policy" in said
    shutil.copytree(world.chat, trunk)
    said = refused("search.beam", *elsewhere)
    assert f"the model at {trunk!r} is not the trunk that 'pav.ckpt' was trained on" in said
    assert said.endswith("name the right one with --trunk")


def test_verifier_of_a_moved_trunk_is_served_where_trunk_names_it(
    world: World, make_verifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.policy, "trunk")
    make_verifier(Path("trunk"), tmp_path / "pav.ckpt")
    Path("trunk").rename("moved")
    run(beam, BeamConfig, "search.beam",
        ["--verifier", "pav.ckpt", "--trunk", "./moved", "--policy", "./moved", "--n", "1",
         "--problems", "1", "--engine.kv_gib", "0.02"])  # fmt: skip
    assert len(list(tmp_path.glob("search/*/beam.jsonl"))) == 1


def test_fused_scoring_with_a_trunk_that_is_not_the_policy(
    refused: Callable[..., str], world: World, make_verifier: Any, tmp_path: Path
) -> None:
    make_verifier(Path(world.policy), tmp_path / "pav.ckpt", frozen=False)
    said = refused("search.beam", "--verifier", str(tmp_path / "pav.ckpt"), "--scoring", "fused")
    assert "its trunk was trained; use --scoring separate" in said


def test_model_that_vllm_cannot_serve_leaves_no_output(
    refused: Callable[..., str], world: World, make_verifier: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.policy, "toy")
    config = json.loads(Path("toy/config.json").read_text())
    config.update(num_attention_heads=4, head_dim=16)
    Path("toy/config.json").write_text(json.dumps(config))
    make_verifier(Path(world.policy), tmp_path / "pav.ckpt")
    searched = ["--verifier", "pav.ckpt", "--policy", "./toy", "--scoring", "separate",
                "--output", "run"]  # fmt: skip
    for arguments in (
        ["data_gen.rollouts", "--policy", "./toy", "--task", "Tape", "--output", "run"],
        ["search.beam", *searched],
        ["search.best_of_n", *searched],
    ):
        said = refused(*arguments)
        assert "vLLM cannot serve 'toy' on this device: its head_dim is 16" in said
        assert not Path("run").exists()


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("data_gen.rollouts", ["--output", "x", "--n_mc", "-1"],
         "n_mc is -1; give at least one trace"),
        ("data_gen.rollouts", ["--output", "x", "--prover_share", "2"],
         "prover_share is 2.0; give a share from 0 to 1"),
        ("data_gen.rollouts", ["--output", "x", "--sampler.temperature", "0"],
         "give a temperature above 0"),
        ("data_gen.rollouts", ["--output", "x", "--policy.prompt.template", "Solve it."],
         "prompt.template 'Solve it.' has no {question}; add it"),
        ("pav.train", ["--labels", "[x]", "--alpha", "-1"],
         "alpha is -1.0; give a weight from 0 to 10"),
        ("search.beam", ["--verifier", "x", "--n", "0"], "both must be positive"),
    ],
)  # fmt: skip
def test_value_out_of_range(
    refused: Callable[..., str], command: str, arguments: list[str], message: str
) -> None:
    assert message in refused(command, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler.temperature", "0"], "give a temperature above 0"),
        (["--policy.prompt.template", "Solve it."], "'Solve it.' has no {question}; add it"),
        (["--task", "pav.tasks.tape.Tape", "--task.step_rule.max_tokens", "1"],
         "step_rule.max_tokens is 1; it must exceed min_tokens (0) and 1"),
    ],
)  # fmt: skip
def test_value_out_of_range_of_a_setting_that_may_be_absent(
    refused: Callable[..., str], arguments: list[str], message: str
) -> None:
    assert message in refused("search.beam", "--verifier", "x", *arguments)


def test_command_prints_nothing_but_its_one_line(tmp_path: Path) -> None:
    """As a process of its own, with all that imports may print."""
    done = subprocess.run(
        [sys.executable, "-m", "search.beam", "--verifier", "none.ckpt"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("search.beam: error: no verifier checkpoint at 'none.ckpt'; train one")
