"""Searches that a signal or a full disk ends: one line, and the same command goes on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from pav.cli.run import run
from pav.engine.loading import EngineConfig
from pav.policy.policy import PolicyConfig, Sampler
from pav.tasks.base import Problem
from pav.tasks.tape import Tape
from search.run.opening import plain_session
from search.run.records import Record, open_run, read

PROBLEMS = list(islice(Tape().problems("test"), 12))


@dataclass(frozen=True)
class Config:
    """A search.

    Args:
        output: run directory.
    """

    output: str


Outcome = tuple[int, str, list[str]]
Searching = Callable[..., Outcome]


@pytest.fixture
def searching(tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Searching:
    """Searches in a directory; (exit code, what it said on stderr, problems searched by it)."""
    policy = PolicyConfig(str(tiny_model("llama")))

    def search(output: Path, at: dict[int, Callable[[], None]] | None = None) -> Outcome:
        searched: list[str] = []

        async def one(problem: Problem) -> Record:
            searched.append(problem.id)
            (at or {}).get(len(searched), lambda: None)()
            return Record(problem.id, "x" * 3000, problem.gold, "beam", 1, 0, {}, "1")

        def command(config: Config) -> None:
            session = plain_session(Tape(), policy, Sampler(), EngineConfig())
            directory = Path(config.output)
            with open_run(directory, {"n": 1}):
                session.run(directory / "beam.jsonl", PROBLEMS, one, 2, "beam")

        capsys.readouterr()
        code = 0
        try:
            run(command, Config, "search.beam", ["--output", str(output)])
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, capsys.readouterr().err, searched

    return search


def check_resumed(searching: Searching, output: Path, before: Outcome) -> None:
    """What is written stays, the rest is searched once."""
    kept = [r.problem_id for r in read(output / "beam.jsonl")]
    assert 0 < len(kept) < len(PROBLEMS)
    assert set(kept) <= set(before[2])
    code, said, searched = searching(output)
    assert (code, said) == (0, "")
    assert sorted([*kept, *searched]) == sorted(p.id for p in PROBLEMS)
    assert len(read(output / "beam.jsonl")) == len(PROBLEMS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_search_with_one_line_and_the_same_command_resumes(
    searching: Searching, tmp_path: Path, number: signal.Signals
) -> None:
    handler = signal.getsignal(number)
    ended = searching(tmp_path / "run", {6: lambda: signal.raise_signal(number)})
    assert ended[:2] == (130, "search.beam: interrupted; the same command resumes\n")
    assert signal.getsignal(number) == handler
    check_resumed(searching, tmp_path / "run", ended)


@contextmanager
def small_files(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full(directory: Path, reason: str) -> str:
    return (
        f"search.beam: error: output {str(directory)!r} cannot be written ({reason}); what is "
        "finished is safe: free disk space or raise the quota there, then give the same command "
        "again\n"
    )


def test_file_size_limit_ends_a_search_with_one_line_and_the_same_command_resumes(
    searching: Searching, tmp_path: Path
) -> None:
    with small_files(20_001):
        ended = searching(tmp_path / "run")
    assert ended[:2] == (2, full(tmp_path / "run", "File too large"))
    check_resumed(searching, tmp_path / "run", ended)


def test_full_disk_ends_a_search_with_one_line_and_the_same_command_resumes(
    searching: Searching, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a disk small enough to fill")
    try:
        ended = searching(disk / "run")
        assert ended[:2] == (2, full(disk / "run", "No space left on device"))
        # Still full: nothing is lost by trying.
        assert searching(disk / "run")[:2] == (2, full(disk / "run", "No space left on device"))
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        check_resumed(searching, disk / "run", ended)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
