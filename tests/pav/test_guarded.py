"""Graders of users raise and hang: that counts as wrong and is named, and nothing else stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from data_gen.config import RolloutsConfig
from data_gen.label_run import read_run
from data_gen.regrade import RegradeConfig, regrade
from data_gen.rollouts import rollouts
from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.grading import sandbox as module
from pav.grading.sandbox import GRADER_LOG, GraderFailed, GuardedGrader, guarded
from pav.labels.tables import read_labels
from pav.policy.cost import Cost
from pav.policy.policy import PolicyConfig, Sampler, load_policy
from pav.tasks.base import Grade, Problem, Task
from pav.tasks.tape import Tape
from pav.verifier.pick import Candidate
from search.methods.expand import SearchResult
from search.run.failures import ERRORS
from search.run.records import Record
from search.run.session import Session
from search.run.solve import searched

REPOSITORY = Path(__file__).parents[2]
PROBLEM = Problem("p1", "1+1", "2")
# Light to import: its process starts in no time.
MINE = """
import os, re, sys, time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pav.tasks.base import Grade, Problem, Split, Task


@dataclass(frozen=True)
class Mine(Task):
    offset: int = 0

    def problems(self, split: Split) -> Iterator[Problem]:
        return iter([])

    def grade(self, text: str, problem: Problem) -> Grade:
        print("a grader may print")
        if text == "hang":
            time.sleep(1000)
        if text == "regex":
            re.fullmatch(r"(a|a)*b", "a" * 40)  # holds the interpreter, so no thread could go on
        if text == "exit":
            sys.exit(3)
        if text == "crash":
            os.kill(os.getpid(), 11)
        if text == "number":
            return Grade(7, True)
        if "vllm" in sys.modules:
            raise AssertionError("an engine's library was imported")
        return Grade(text, int(text) + self.offset == int(problem.gold))

"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Task]:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    import mine

    yield mine.Mine(offset=1)
    del sys.modules["mine"]


def test_grader_that_raises_hangs_or_dies_counts_as_wrong_and_the_next_answer_is_graded(
    mine: Task, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    with guarded(mine, log, 1.0) as grader:
        assert grader.grade("1", PROBLEM) == Grade("1", True)
        assert grader.grade("2", PROBLEM) == Grade("2", False)
        for text in ("hang", "regex", "exit", "crash", "number", "no digits"):
            started = time.monotonic()
            assert grader.grade(text, PROBLEM) == Grade(None, False)
            assert time.monotonic() - started < 60  # a hang would take a thousand
            assert grader.grade("1", PROBLEM).correct
        assert (grader.errors, grader.graded) == (6, 14)
    said = capfd.readouterr().err
    assert "WARNING: the grader failed for an answer to problem p1, which counts as wrong: " in said
    assert "TimeoutError: no grade within 1 s (--grade_timeout); the text: 'hang'" in said
    assert said.count("counts as wrong") == module.NAMED
    assert f"the grader failed for 6 of 14 answers, which count as wrong; tracebacks: {log}" in said
    logged = log.read_text()
    assert "the answer is 7; it must be text or None" in logged
    assert "SystemExit: 3" in logged and "exit code -11" in logged
    # The grader's own line, though it ran elsewhere.
    assert "in grade\n    return Grade(text, int(text) + self.offset" in logged
    assert "grading problem p1, text 'no digits'\nTraceback" in logged


def test_grader_that_fails_too_often_ends_the_run_and_the_first_failure_does_not(
    mine: Task, tmp_path: Path
) -> None:
    with GuardedGrader(mine, tmp_path / "log", 5.0) as grader:
        for _ in range(module.MIN_ERRORS - 1):
            grader.grade("no digits", PROBLEM)
        with pytest.raises(GraderFailed, match=r"failed for 10 of 10 answers, .*ValueError"):
            grader.grade("no digits", PROBLEM)
    with GuardedGrader(mine, tmp_path / "log", 5.0, graded=1000) as grader:
        for _ in range(50):  # 5% of the answers
            grader.grade("no digits", PROBLEM)
        assert grader.errors == 50


def test_graders_of_the_package_need_no_process_and_what_they_raise_is_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with GuardedGrader(Tape(), tmp_path / "log") as grader:
        assert grader.grade("A2", PROBLEM) == Grade("2", True)
        assert not grader._idle

        class Local(Tape):  # cannot be had in another process: it is graded all the same
            def grade(self, text: str, problem: Problem) -> Grade:
                return Grade("x", 1 // len(text) == 1)

    with GuardedGrader(Local(), tmp_path / "log") as grader:
        assert grader.grade("1", PROBLEM) == Grade("x", True)
        assert grader.grade("", PROBLEM) == Grade(None, False)
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()


def test_time_limit_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="grade_timeout is 0"):
        RolloutsConfig("x", grade_timeout=0.0)


WAITING = """
import sys
from pav.core.signals import interruptible
from pav.engine.loop import drive
from pav.grading.sandbox import GuardedGrader
from pav.tasks.base import Problem
from mine import Mine

async def job():
    print("grading", flush=True)
    GuardedGrader(Mine(), None, 1000.0).grade("hang", Problem("p", "q", "1"))

with interruptible():
    drive([], [job] * 50, print, 50)
"""


@pytest.mark.usefixtures("mine")
def test_first_ctrl_c_ends_a_run_whose_graders_hang(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}"},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "grading\n"
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=120)
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert "never retrieved" not in said


BROKEN = """
from pathlib import Path
from pav.tasks.base import Grade, Problem
from pav.tasks.tape import Tape


class Broken(Tape):
    def grade(self, text: str, problem: Problem) -> Grade:
        if Path("broken").exists():
            raise KeyError("my own bug")
        return super().grade(text, problem)
"""


def test_label_run_with_a_broken_grader_stops_sealed_and_goes_on_once_it_is_mended(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("broken_task.py").write_text(BROKEN)
    Path("broken").touch()
    from broken_task import Broken

    config = RolloutsConfig(
        "run",
        Broken(),
        PolicyConfig(str(tiny_model("llama")), name="base"),
        sampler=Sampler(max_length=48),
        problems=6,
        validation_problems=0,
        n_traces=2,
        engine=EngineConfig(kv_gib=0.05),
    )
    with pytest.raises(UserError, match=r"'my own bug'; mend it .*data_gen.regrade run") as raised:
        rollouts(config)
    assert "\n" not in str(raised.value)
    assert "KeyError: 'my own bug'" in Path("run", GRADER_LOG).read_text()
    assert read_run("run").sealed
    before = read_labels(["run"])
    assert before.traces and not any(t.correct for t in before.traces)
    assert capfd.readouterr().err.count("which counts as wrong: KeyError: 'my own bug'") == 3

    Path("broken").unlink()
    rollouts(config)
    regrade(RegradeConfig("run", Broken()))
    rollouts(RolloutsConfig(**{**vars(config), "task": Tape(), "output": "sound"}))
    mended, sound = read_labels(["run"]), read_labels(["sound"])
    assert {t.trace_id: t for t in mended.traces} == {t.trace_id: t for t in sound.traces}
    assert mended.counts == sound.counts


def test_search_counts_ungraded_answers_as_wrong_names_them_and_fails_above_a_share(
    mine: Task,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = load_policy(PolicyConfig(str(tiny_model("llama"))), mine.step_rule)
    session = Session(mine, policy, Sampler(), EngineConfig())
    problems = [Problem(f"p{i}", f"{i}+1", str(i + 1)) for i in range(4)]

    async def search(problem: Problem, broken: set[str]) -> Record:
        async def found(_: Cost) -> SearchResult:
            text = "=" if problem.id in broken else problem.question[0]
            ids = policy.tokenizer.encode(text, add_special_tokens=False)
            candidate = Candidate(ids, [len(ids)], {}, 0.0, True, False)
            return SearchResult([candidate], 0, 0, [], [])

        settings = {"pick": "majority"}
        return await searched(session, problem, "beam", 1, 0, settings, None, "", found)

    def run(broken: set[str]) -> list[Record]:
        job = partial(search, broken=broken)
        return session.run(tmp_path / "beam.jsonl", problems, job, 2, "beam N=1")[0]

    records = run({"p2"})
    assert [r.correct for r in records] == [True, True, False, True]
    assert [r.ungraded for r in records] == [0, 0, 1, 0]
    said = capsys.readouterr().err
    assert "the grader failed for an answer to problem p2, which counts as wrong" in said
    assert "WARNING: beam N=1: the grader failed for 1 answers to 1 of 4 problems (p2)" in said
    assert "invalid literal for int()" in (tmp_path / ERRORS).read_text()
    with pytest.raises(UserError, match=r"beam N=1: 25.0% of the answers could not be graded"):
        session.check()
    # The grader is mended: the same command grades that problem alone, and all is well.
    assert [r.correct for r in run(set())] == [True] * 4
    session.check()
    session.shutdown()
