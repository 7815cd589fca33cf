"""The command line: one line for a slip, with the nearest name, and no waiting for --help."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pav.cli.run import run
from search.beam import BeamConfig

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
        (["--orm", "{model: x, layot: y}"], "unknown setting layot; did you mean orm.layout?"),
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
        ("Tap", "task 'Tap' is unknown; did you mean Tape? (built in are Gsm8k, "),
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


def test_help_and_looking_at_runs_wait_for_no_model_library() -> None:
    light = ["beam", "best_of_n", "dvts", "smc", "alphallm", "compare", "select", "serve", "report"]
    modules = [f"search.{name}" for name in light]
    light = ["rollouts", "status", "show", "regrade", "merge", "select_prover", "likelihood"]
    modules += [f"data_gen.{name}" for name in [*light, "import_labels"]]
    modules += [f"pav.{name}" for name in ("evaluate", "processbench", "convert", "export_prm")]
    program = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    sys.argv = [name, '--help']\n"
        "    try: importlib.import_module(name).main()\n"
        "    except SystemExit as stopped: assert stopped.code == 0\n"
        "heavy = {'torch', 'transformers', 'lightning', 'vllm', 'scipy', 'datasets'}\n"
        "print(heavy & set(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.count("usage: ") == len(modules), done.stderr
    assert done.stderr.splitlines()[-1] == "set()"
