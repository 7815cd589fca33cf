"""The command line: one line for a slip, with the nearest name, and no waiting for --help."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from data_gen.config import RolloutsConfig
from pav.cli.run import run
from pav.reward_models.text import RewardModelConfig
from search.beam import BeamConfig
from search.compare.plan import CompareConfig
from search.serve.command import ServeConfig

TASK = """
from dataclasses import dataclass
from pav.tasks.base import Task

@dataclass(frozen=True)
class MyTask(Task):
    data: str = "x"

    def problems(self, split):
        return iter(())

    def grade(self, text, problem):
        raise NotImplementedError
"""


@pytest.fixture
def said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., str]:
    """What search.beam says, in one line, to arguments that it refuses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "tasks_of_mine.py").write_text(TASK)
    (tmp_path / "search.yaml").write_text("n: 2\nproblms: 3\n")

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(lambda _: pytest.fail("it ran"), BeamConfig, "search.beam", arguments)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return str(line)

    return refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problms", "5"], "unknown option --problms; did you mean --problems?"),
        (["--problms=5"], "unknown option --problms; did you mean --problems?"),
        (["--policy.modle", "x"], "unknown option --policy.modle; did you mean --policy.model?"),
        (["--policy.prompt.chta", "true"], "did you mean --policy.prompt.chat?"),
        (["--task", "Tape", "--task.n_opz", "3"], "did you mean --task.n_ops?"),
        (["--task", "tasks_of_mine.MyTask", "--task.dta", "x"], "did you mean --task.data?"),
        (["--config", "search.yaml"], "problms in search.yaml; did you mean problems?"),
        (["--qqqqqq", "1"], "unknown option --qqqqqq (search.beam"),
        (["--n", "b"], "--n is 'b': expected int"),
        (["--split", "all"], "--split is 'all': expected one of 'train', 'validation', 'test'"),
        (["--n"], "argument --n: expected one argument"),
        (["beam"], "unrecognized arguments: beam"),
        (["-problems", "4"], "unknown option -problems; did you mean --problems?"),
        (["--reward_model", "{model: x, layot: y}"], "layot; did you mean reward_model.layout?"),
    ],
)  # fmt: skip
def test_wrong_option_is_one_line_with_the_nearest_name(
    said: Callable[..., str], arguments: list[str], message: str
) -> None:
    line = said(*arguments)
    assert line.startswith("search.beam: error: ") and message in line
    assert line.endswith("(search.beam --help lists all)")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("Tap", "task 'Tap' is unknown; did you mean Tape? (built in are Alpaca, Gsm8k, "),
        ("nowhere.MyTask", "there is no module 'nowhere'; start the command in the directory"),
        ("tasks_of_mine.MyTsk", "'tasks_of_mine' has no MyTsk; did you mean MyTask?"),
    ],
)
def test_task_that_is_not_there_is_one_line(
    said: Callable[..., str], task: str, message: str
) -> None:
    assert message in said("--task", task)


def test_task_module_that_raises_is_one_line_and_its_traceback_a_file(
    said: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "raising.py").write_text("import pav\nraise ValueError('no\\ndata')\n")
    line = said("--task", "raising.MyTask")
    assert "importing the module 'raising' raised ValueError: no data; the traceback" in line
    log = Path(line.rpartition(" ")[2])
    assert 'raising.py", line 2' in log.read_text()
    log.unlink()
    (tmp_path / "lacking.py").write_text("import a_package_of_nobody\n")
    line = said("--task", "lacking.MyTask")
    assert "raised ModuleNotFoundError: No module named 'a_package_of_nobody'" in line
    Path(line.rpartition(" ")[2]).unlink()


def test_version_names_what_it_runs_on(capsys: pytest.CaptureFixture[str]) -> None:
    taken: list[Any] = []
    with pytest.raises(SystemExit) as stopped:
        run(taken.append, BeamConfig, "search.beam", ["--version"])
    assert stopped.value.code == 0 and not taken
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("search.beam: pav-engine 0.") and "torch 2." in line


SCRIPTS: dict[str, str] = tomllib.loads(
    Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
)["project"]["scripts"]
HEAVY = (
    "torch", "transformers", "lightning", "vllm", "scipy", "datasets", "matplotlib", "fastapi",
    "ray", "peft", "torchmetrics", "sympy", "huggingface_hub", "uvicorn",
)  # fmt: skip


def test_help_and_version_of_no_command_wait_for_a_model_library() -> None:
    program = (
        "import importlib, sys\n"
        f"for name, place in {list(SCRIPTS.items())}:\n"
        "    for option in ('--help', '--version'):\n"
        "        sys.argv = [name, option]\n"
        "        module, _, main = place.partition(':')\n"
        "        try: getattr(importlib.import_module(module), main)()\n"
        "        except SystemExit as stopped: assert stopped.code == 0\n"
        f"        found = {set(HEAVY)} & set(sys.modules)\n"
        "        assert not found, f'{name} {option} imports {found}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(SCRIPTS)
    assert done.stdout.count(": pav-engine ") == len(SCRIPTS)


def test_command_whose_output_nobody_reads_ends_quietly() -> None:
    unread, output = os.pipe()
    os.close(unread)
    done = subprocess.run(
        [sys.executable, "-m", "search.beam", "--help"], stdout=output, stderr=subprocess.PIPE,
        check=False,
    )  # fmt: skip
    os.close(output)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_not_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    def break_pipe(config: BeamConfig) -> None:
        raise BrokenPipeError("a worker's")

    with pytest.raises(BrokenPipeError, match="a worker's"):
        run(break_pipe, BeamConfig, "search.beam", [])


Command = tuple[Callable[..., Any], Any, str]


def command_of(script: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    """What a console script calls, its settings, and its name."""
    place, _, main = SCRIPTS[script].partition(":")
    module = importlib.import_module(place)
    taken: list[Command] = []
    name = "run" if hasattr(module, "run") else "run_on_directories"
    monkeypatch.setattr(module, name, lambda *given, **_: taken.append(given[:3]))
    getattr(module, main)()
    return taken[0]


# Settings without a default.
NEEDED = {
    "labels": "[runs/labels]",
    "methods": "[{name: a, verifier: a.ckpt}]",
    "threshold": "0.5",
    "format": "prm800k",
}
# What a command needs one of several settings for, and which of the others it then refuses.
CHOSEN = {"pav.rl": "verifier"}
REFUSED = {"pav.rl": {"policy"}}
# Others whose values are objects.
NESTED = {
    "task": ["--task", "Tape", "--task.n_ops", "3"],
    "policy": ["--policy", "some/where", "--policy.prompt.system", "Add: it"],
    "prover": ["--prover", "[{model: a}, {model: b, prompt: {chat: true}}]"],
    "sampler": ["--sampler.temperature", "0.5"],
    "reward_model": ["--reward_model", "some/where"],
    "lora": ["--lora.targets", "[q_proj]"],
}


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_command_takes_the_configuration_that_it_prints(
    script: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, config_type, prog = command_of(script, monkeypatch)
    needed = [
        f"--{f.name}={NEEDED.get(f.name, 'some/where')}"
        for f in fields(config_type)
        if (f.default is MISSING and f.default_factory is MISSING)
        or f.name in ("threshold", CHOSEN.get(script))
    ]
    # A prover of searches is a head.
    nested = [arg for f in fields(config_type) if f.name in NESTED and f.type != "str | None"
              and f.name not in REFUSED.get(script, ())
              for arg in NESTED[f.name]]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for given in (needed, [*needed, *nested]):
        taken: list[Any] = []
        with pytest.raises(SystemExit) as stopped:
            run(taken.append, config_type, prog, [*given, "--print_config"])
        assert stopped.value.code == 0
        file = tmp_path / "printed.yaml"
        file.write_text(capsys.readouterr().out)
        run(taken.append, config_type, prog, given)
        run(taken.append, config_type, prog, ["--config", str(file)])
        assert taken[0] == taken[1]
        assert capsys.readouterr().err == ""


def test_old_names_of_options_are_read_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[Any] = []
    run(taken.append, RolloutsConfig, "data_gen.rollouts",
        ["--output", "o", "--n_seeds", "3", "--seeds_from=t.jsonl"])  # fmt: skip
    assert (taken[-1].n_traces, taken[-1].traces_from) == (3, "t.jsonl")
    assert capsys.readouterr().err.splitlines() == [
        "WARNING: --n_seeds is now --n_traces",
        "WARNING: --seeds_from is now --traces_from",
    ]
    file = tmp_path / "old.yaml"
    file.write_text("output: o\nn_seeds: 5\n")
    run(taken.append, RolloutsConfig, "data_gen.rollouts", ["--config", str(file)])
    assert taken[-1].n_traces == 5
    assert capsys.readouterr().err == f"WARNING: n_seeds in {file} is now n_traces\n"
    # What else is wrong with it is still said of the file.
    file.write_text("output: o\nn_seeds: 5\nproblms: 3\n")
    with pytest.raises(SystemExit):
        run(taken.append, RolloutsConfig, "data_gen.rollouts", ["--config", str(file)])
    assert f"unknown setting problms in {file}; did you mean pro" in capsys.readouterr().err


def test_old_name_of_reward_models_is_read_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[Any] = []
    run(taken.append, BeamConfig, "search.beam", ["--orm", "a/model", "--orm.layout", "token"])
    assert taken[-1].reward_model == RewardModelConfig("a/model", layout="token")
    assert capsys.readouterr().err.count("WARNING: --orm is now --reward_model\n") == 2
    methods = "[{name: a, verifier: a}, {name: b, kind: best_of_n, orm: {model: m}}]"
    run(taken.append, CompareConfig, "search.compare", ["--methods", methods, "--output", "o"])
    file = tmp_path / "old.yaml"
    file.write_text(f"output: o\nmethods: {methods}\n")
    run(taken.append, CompareConfig, "search.compare", ["--config", str(file)])
    assert taken[-1] == taken[-2] and taken[-1].methods[1].reward_model == RewardModelConfig("m")
    assert capsys.readouterr().err.splitlines() == [
        "WARNING: orm of a method is now reward_model",
        f"WARNING: orm in {file} is now reward_model",
    ]
    # The ORM of a server is one.
    run(taken.append, ServeConfig, "search.serve", ["--orm", "orm.ckpt"])
    assert taken[-1].orm == "orm.ckpt" and capsys.readouterr().err == ""
