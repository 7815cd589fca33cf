"""Searches over several workers: real processes with real vLLM, killed and stopped midway."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from search.run.worker import Alive, Ask, Found, Refused

from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.engine.processes import Died, Processes
from pav.policy.policy import Sampler
from pav.tasks.base import Problem
from search.beam import BeamConfig
from search.compare import command as comparison
from search.compare.command import CompareConfig, Method, compare
from search.run import workers as search_workers
from search.run.records import Record, read
from search.run.workers import DEATHS, Workers

# Roomy: random models do not know when to end.
SAMPLER = Sampler(max_length=120)
# One problem at a time: then nothing that a worker computes depends on what else is in its batch.
ONE_AT_A_TIME = 1


@pytest.fixture(scope="module")
def config(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path_factory: pytest.TempPathFactory
) -> CompareConfig:
    folder = tmp_path_factory.mktemp("workers")
    model = tiny_model("llama")
    make_verifier(model, folder / "pav.ckpt", heads=("q/base", "q/prover", "orm"), sampler=SAMPLER)
    make_verifier(model, folder / "orm.ckpt", heads=("orm",), sampler=SAMPLER)
    return CompareConfig(
        methods=[
            Method("beam", verifier=str(folder / "pav.ckpt")),
            Method("best", "best_of_n", str(folder / "orm.ckpt"), pick="orm"),
        ],
        output=str(folder / "one"),
        n=[2],
        problems=6,
        concurrency=ONE_AT_A_TIME,
        engine=EngineConfig(kv_gib=0.02, max_num_seqs=32),
    )


def records(config: CompareConfig) -> dict[str, dict[str, Any]]:
    """File -> problem -> record without its values; no problem is there twice.

    What was sampled, kept, picked and spent. Values differ in their last digits where processes
    have other numbers of threads.
    """
    found = {}
    for path in Path(config.output).glob("*.jsonl"):
        lines = read(path)
        found[path.name] = {r.problem_id: without_floats(asdict(r)) for r in lines}
        assert len(found[path.name]) == len(lines)
    return found


def without_floats(value: Any) -> Any:
    """Plain data with None in the place of every float."""
    if isinstance(value, dict):
        return {key: without_floats(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_floats(v) for v in value]
    return None if isinstance(value, float) else value


def test_killed_worker_and_another_number_of_workers_make_the_records_of_one_process(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Plots are others' business.
    monkeypatch.setattr(comparison, "_report", lambda *_: None)
    compare(config)
    wanted = records(config)
    two = replace(config, output=str(Path(config.output).with_name("two")), workers=2)
    started: list[int] = []
    killed: list[int] = []
    with monkeypatch.context() as patch:
        start, answer = Processes.start, Workers._answer

        def counted(self: Processes, worker: int) -> None:
            started.append(worker)
            start(self, worker)

        def kill(self: Workers, number: int) -> None:
            # In the last search, that reads samples: nothing waits for the one in its place then.
            reads = bool(self._queue) and len(self._queue[0]) == 2
            if not killed and number == 1 and reads and self._workers[1].held:
                process = self._processes._running[1][0]
                process.kill()
                process.wait()
                killed.append(process.pid)
            answer(self, number)

        patch.setattr(Processes, "start", counted)
        patch.setattr(Workers, "_answer", kill)
        compare(two)
    assert "WARNING: worker 1 died (signal SIGKILL); the " in capfd.readouterr().err
    # All searches are those of two workers and one in a dead one's place.
    assert started == [0, 1, 1]
    assert records(two) == wanted

    # Another number of workers goes on; what is there is not searched again.
    path = next(Path(two.output).glob("beam-*.jsonl"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    compare(replace(two, workers=1))
    assert path.read_bytes().splitlines(keepends=True)[:3] == lines[:3]
    assert records(two) == wanted


def test_worker_that_hangs_hands_on_its_problems_and_the_last_one_ends_the_run(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "_report", lambda *_: None)
    compare(config)
    wanted = records(config)
    two = replace(config, output=str(Path(config.output).with_name("stopped")), workers=2)
    stopped: list[int] = []
    with monkeypatch.context() as patch:
        answer = Workers._answer

        def stop(self: Workers, number: int) -> None:
            # Worker 1 in the first search, and worker 0 in the last, that reads samples.
            reads = bool(self._queue) and len(self._queue[0]) == 2
            next_one = (1, False) if not stopped else (0, True)
            if len(stopped) < 2 and self._workers[number].held and (number, reads) == next_one:
                process = self._processes._running[number][0]
                process.send_signal(signal.SIGSTOP)
                stopped.append(process.pid)
            answer(self, number)

        patch.setattr(search_workers, "SILENT_SECONDS", 6.0)
        patch.setattr(Workers, "_answer", stop)
        with pytest.raises(
            UserError, match=r"worker 0 was silent for 6 seconds .* no other .* left"
        ):
            compare(two)
    said = capfd.readouterr().err
    assert "WARNING: worker 1 was silent for 6 seconds and is ended; the " in said
    assert "problems that it held go to the others (1 of 2 workers are left)" in said
    assert len(stopped) == 2
    for process in stopped:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    # All that was found before is there, and the same command goes on.
    for name, kept in records(two).items():
        assert kept.items() <= wanted[name].items()
    compare(replace(two, workers=1))
    assert records(two) == wanted


class Scripted:
    """Workers that answer and die by lot: what is made of that is under test."""

    def __init__(self, lot: Random, deaths: int = 0) -> None:
        self.lot, self.deaths = lot, deaths
        self.inbox: dict[int, list[Any]] = {}
        self.held: dict[int, list[Any]] = {}
        self.asks: dict[int, bool] = {}
        self.most_held = 0
        self.searched: Counter[str] = Counter()
        self.coming: list[tuple[int, Any]] = []
        self.closed = False

    def start(self, worker: int) -> None:
        self.inbox[worker], self.held[worker], self.asks[worker] = [], [], False

    def send(self, worker: int, message: Any) -> None:
        self.inbox[worker].append(message)

    def receive(self, seconds: float) -> list[tuple[int, Any]]:
        coming, self.coming = self.coming, []
        for worker, inbox in self.inbox.items():
            if self.held[worker] and self.deaths and self.lot.random() < 0.2:
                self.deaths -= 1
                coming.append((worker, Died("signal SIGKILL")))
                continue
            if self.lot.random() < 0.5:
                continue  # it is slow
            if self.held[worker] and self.lot.random() < 0.7:
                (problem,) = self.held[worker].pop(0)
                self.searched[problem.id] += 1
                record = Record(problem.id, "", None, "beam", 1, 0, {})
                # What a worker says twice counts once.
                coming += [(worker, Found(record))] * 2
            if inbox and (self.asks[worker] or not self.held[worker]):
                message = inbox.pop(0)
                # An answer to what it asked, or a job.
                if self.asks[worker]:
                    self.asks[worker] = message is not None
                    if message is None:
                        continue
                    self.held[worker].append(message)
                    self.most_held = max(self.most_held, len(self.held[worker]))
                self.asks[worker] = True
                coming.append((worker, Ask()))
        return coming

    def close(self) -> None:
        self.closed = True


def scripted(transport: Scripted, count: int) -> Workers:
    workers = Workers(count, EngineConfig())
    workers._processes = transport  # type: ignore[assignment]
    return workers


SESSION: Any = SimpleNamespace(task=None)


@pytest.mark.parametrize("seed", range(10))
def test_every_problem_of_every_search_is_kept_once_whoever_dies(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    transport = Scripted(Random(seed), deaths=DEATHS - 1)
    workers = scripted(transport, 3)
    for name, count in (("a", 1), ("b", 20), ("c", 2)):
        problems = [Problem(f"{name}{i}", "") for i in range(count)]
        kept: list[str] = []
        workers.open(SESSION, read, count, 4)  # type: ignore[arg-type]
        workers.run([(p,) for p in problems], lambda r, kept=kept: kept.append(r.problem_id))  # type: ignore[misc]
        assert sorted(kept) == sorted(p.id for p in problems)
    assert transport.most_held <= 20
    assert capsys.readouterr().err.count("WARNING: worker ") == DEATHS - 1 - transport.deaths


def test_worker_that_dies_again_and_again_ends_the_run() -> None:
    transport = Scripted(Random(0), deaths=99)
    workers = scripted(transport, 1)
    workers.open(SESSION, read, 50, 4)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"worker 0 died 3 times within 10 minutes, at last by sig"):
        workers.run([(Problem(str(i), ""),) for i in range(50)], lambda _: None)
    assert transport.closed


class Slow(Scripted):
    """A worker whose messages come when they are told to, on a clock of its own."""

    def __init__(self, messages: list[tuple[float, Any]]) -> None:
        super().__init__(Random(0))
        self.messages, self.now = messages, 0.0
        self.ended: list[int] = []

    def receive(self, seconds: float) -> list[tuple[int, Any]]:
        self.now += 100.0
        if not self.messages or self.messages[0][0] > self.now:
            return []
        return [(0, self.messages.pop(0)[1])]

    def end(self, worker: int) -> None:
        self.ended.append(worker)


def test_loading_and_a_long_search_are_not_taken_for_hanging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Found(Record("a", "", None, "beam", 1, 0, {}))
    # Hours until it has started, hours until it has loaded, and an hour of engine steps.
    steps = [(20_000.0 + 500 * i, Alive()) for i in range(1, 8)]
    asks = [(20_000.0, Ask()), (20_100.0, Ask())]  # for the first problem, and for one ahead
    slow = Slow([(10_000.0, Alive()), *asks, *steps, (24_000.0, found)])
    monkeypatch.setattr(search_workers, "monotonic", lambda: slow.now)
    workers = scripted(slow, 1)
    workers.open(SESSION, read, 1, 4)  # type: ignore[arg-type]
    assert "waiting: workers that still load their models: 0\n" in capsys.readouterr().err
    kept: list[Record] = []
    workers.run([(Problem("a", ""),)], kept.append)
    assert kept == [found.record] and not slow.ended
    # The same worker does not even take the next search.
    with pytest.raises(UserError, match=r"worker 0 was silent for 600 .* the problems none\."):
        workers.open(SESSION, read, 1, 4)  # type: ignore[arg-type]
    assert slow.ended == [0] and slow.closed


def test_what_the_user_can_mend_ends_the_run_at_once() -> None:
    transport = Scripted(Random(0))
    transport.coming.append((0, Refused("vLLM cannot load 'x': no such file")))
    with pytest.raises(UserError, match=r"^vLLM cannot load 'x'"):
        scripted(transport, 1).open(SESSION, read, 1, 4)  # type: ignore[arg-type]
    assert transport.closed
    with pytest.raises(UserError, match=r"cannot be sent to workers .*or use --workers 1"):
        scripted(Scripted(Random(0)), 1).open(SESSION, lambda: None, 1, 4)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="workers is 0; give 1 or more"):
        BeamConfig(workers=0)
