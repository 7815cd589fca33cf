"""Label runs over several workers: real processes and Ray actors with real vLLM, killed midway."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_gen.workers.pool import (
    DEATHS,
    WORKERS,
    Alive,
    Call,
    Finished,
    Message,
    Model,
    Pool,
    Refused,
    RemoteEngine,
    Started,
)

from data_gen.config import RolloutsConfig
from data_gen.inspect.status import StatusConfig, status
from data_gen.rollouts import rollouts
from pav.core.errors import UserError
from pav.core.journal import JOURNAL, journal_lines
from pav.core.progress import Reporter
from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.engine.processes import Died, placement
from pav.engine.vllm import VllmEngine
from pav.policy.inference import Sampled
from pav.policy.policy import PolicyConfig, Sampler
from pav.tasks.tape import Tape

Asked = Counter[tuple[tuple[int, ...], int, int]]


@pytest.fixture(scope="module")
def config(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> RolloutsConfig:
    return RolloutsConfig(
        output=str(tmp_path_factory.mktemp("labels") / "one"),
        task=Tape(),
        ignore_warnings=True,
        policy=PolicyConfig(str(tiny_model("llama")), name="base"),
        sampler=Sampler(max_length=48),
        problems=40,
        validation_problems=4,
        n_traces=2,
        n_mc=4,
        concurrency=16,
        engine=EngineConfig(kv_gib=0.02, max_num_seqs=32),
    )


@pytest.fixture(scope="module")
def asked(config: RolloutsConfig) -> Asked:
    """The requests of the run without workers; its labels lie in ``config.output``."""
    with pytest.MonkeyPatch.context() as patch:
        found = recorded(patch, VllmEngine)
        rollouts(config)
    return found


def recorded(patch: pytest.MonkeyPatch, engine: type[VllmEngine | RemoteEngine]) -> Asked:
    """Counts (ids, seed, most tokens) of every request from now on."""
    found: Asked = Counter()
    inner = engine.sample

    async def sample(self: Any, ids: list[int], sampler: Sampler, **settings: Any) -> Sampled:
        found[tuple(ids), settings["seed"], settings["max_tokens"]] += 1
        return await inner(self, ids, sampler, **settings)

    patch.setattr(engine, "sample", sample)
    return found


def rows(output: str) -> Counter[str]:
    """What the sealed tables say was made: one entry per row."""
    found: Counter[str] = Counter()
    for table in ("traces", "completions"):
        for row in pq.read_table(Path(output) / table).to_pylist():
            key = ("trace_id",) if table == "traces" else ("prefix_key", "policy", "index")
            found[json.dumps([row[k] for k in key])] += 1
    return found


def kill_a_worker(patch: pytest.MonkeyPatch, then_terminate: bool = False) -> list[int]:
    """Kills worker 1 once it has answered some requests and holds more.

    ``then_terminate``: when the other one has answered more, this process gets SIGTERM.
    """
    killed: list[int] = []
    inner = Pool.step
    answered = 0

    def step(self: Pool) -> None:
        nonlocal answered
        inner(self)
        other, worker = self._workers
        if not killed and worker.started and worker.rollouts and worker.holds:
            killed.append(worker.started.process)
            os.kill(worker.started.process, signal.SIGKILL)
            answered = other.rollouts
        elif then_terminate and worker.deaths and other.rollouts > answered + 40:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(Pool, "step", step)
    return killed


def test_killed_worker_then_sigterm_then_one_process_make_the_run_of_one_process(
    config: RolloutsConfig,
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    two = replace(config, output=str(Path(config.output).with_name("two")), workers=2)
    found = recorded(monkeypatch, RemoteEngine)
    with monkeypatch.context() as patch:
        killed = kill_a_worker(patch, then_terminate=True)
        with pytest.raises(KeyboardInterrupt):
            rollouts(two)
    said = capfd.readouterr().err
    assert "WARNING: worker 1 died (signal SIGKILL); the " in said
    assert "it starts again (1 of 2 times)" in said
    note = json.loads((Path(two.output) / WORKERS).read_text())
    assert [w["deaths"] for w in note["workers"]] == [0, 1]
    processes = [w["process"] for w in note["workers"] if w["process"]]
    for process in [*killed, *(int(p.split()[0]) for p in processes)]:
        assert not Path(f"/proc/{process}").exists()
    status(StatusConfig([two.output]))
    assert "  0: ended, process " in capfd.readouterr().out
    entries = [entry for _, entry in journal_lines(Path(two.output) / JOURNAL)]
    before = [e["record"] for e in entries if e is not None and e["kind"] != "run"]
    assert 40 < len(before) < sum(asked.values())
    # Another number of workers goes on.
    later = recorded(monkeypatch, VllmEngine)
    rollouts(replace(two, workers=1))
    assert found.keys() | later.keys() == asked.keys()
    assert rows(two.output) == rows(config.output)
    assert set(rows(two.output).values()) == {1}
    tables = ("traces", "completions")
    kept = [row for t in tables for row in pq.read_table(Path(two.output) / t).to_pylist()]
    assert all(record in kept for record in before)


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (extra 'ray')")
def test_ray_run_of_two_workers_of_which_one_is_killed_asks_for_what_one_process_asks_for(
    config: RolloutsConfig,
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    ray = replace(config, output=str(Path(config.output).with_name("ray")), workers=2, ray="local")
    killed = kill_a_worker(monkeypatch)
    found = recorded(monkeypatch, RemoteEngine)
    rollouts(ray)
    assert len(killed) == 1
    assert "WARNING: worker 1 died (" in capfd.readouterr().err
    # The same prompts, prefixes and seeds, once each. Float32 tells no two tokens apart differently
    # in another batch here; where it does (about one completion in thousands) prefixes may differ.
    assert found == asked
    assert rows(ray.output) == rows(config.output)
    note = json.loads((Path(ray.output) / WORKERS).read_text())
    assert [w["deaths"] for w in note["workers"]] == [0, 1]
    assert sum(w["samples"] for w in note["workers"]) == sum(asked.values())


def test_ray_that_is_not_installed_is_named_with_its_extra(
    config: RolloutsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs the extra 'ray': pip install 'pav-engine\[ray\]'"):
        rollouts(replace(config, output=str(tmp_path / "run"), ray="auto"))


class Scripted:
    """Workers that answer and die by lot: what a pool makes of that is under test.

    Those that hang answer nothing until they are ended.
    """

    def __init__(self, lot: Random, deaths: int = 0, answers: int = 8) -> None:
        self.lot, self.deaths, self.answers = lot, deaths, answers
        self.hanging: set[int] = set()
        self.held: dict[int, deque[Call]] = {}
        self.most_held = 0
        self.answered: Counter[int] = Counter()
        self.leases: list[list[int]] = []
        self.coming: list[tuple[int, Message]] = []
        self.closed = False

    def start(self, worker: int) -> None:
        self.held[worker] = deque()
        self.coming.append((worker, Started(100 + worker, "here")))

    def send(self, worker: int, calls: list[Call]) -> None:
        self.held[worker].extend(calls)
        self.leases.append([call.number for call in calls])
        self.most_held = max(self.most_held, len(self.held[worker]))

    def receive(self, seconds: float) -> list[tuple[int, Message]]:
        coming, self.coming = self.coming, []
        for worker, held in self.held.items():
            if worker in self.hanging:
                continue
            if held and self.deaths and self.lot.random() < 0.2:
                self.deaths -= 1
                coming.append((worker, Died("signal SIGKILL")))
                held.clear()
                continue
            done = [held.popleft() for _ in range(min(len(held), self.answers))]
            self.answered.update(call.number for call in done)
            answers = [(call.number, Sampled([*call.ids, 7], True)) for call in done]
            # What a worker says twice, or for another, counts once.
            coming += [(worker, Finished(answers)), (0, Finished(answers[:1]))]
        return coming

    def end(self, worker: int) -> None:
        self.hanging.remove(worker)
        self.held[worker].clear()

    def close(self) -> None:
        self.closed = True


def sampled(transport: Scripted, count: int, workers: int) -> list[Sampled]:
    """Answers to ``count`` requests, the i-th from the ids [i]."""
    model = Model("nowhere", "float32", 48, EngineConfig(max_num_seqs=16))
    pool = Pool(transport, [model, model], workers, None)
    answers: dict[int, Sampled] = {}

    async def job(i: int) -> None:
        answers[i] = await pool.engines[i % 2].sample(
            [i], Sampler(), stop_ids=[2], max_tokens=4, seed=i
        )

    drive(pool.engines, [partial(job, i) for i in range(count)], lambda _: None, count)
    assert sum(e.usage.generated for e in pool.engines) == 2 * count
    pool.close()
    assert transport.closed
    return [answers[i] for i in range(count)]


@pytest.mark.parametrize("seed", range(10))
def test_every_request_is_answered_once_whoever_dies(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    transport = Scripted(Random(seed), deaths=DEATHS - 1)
    found = sampled(transport, 200, 3)
    assert [answer.ids for answer in found] == [[i, 7] for i in range(200)]
    assert set(transport.answered.values()) == {1}
    assert capsys.readouterr().err.count("WARNING: worker ") == DEATHS - 1 - transport.deaths


def test_worker_that_hangs_is_ended_and_what_it_held_goes_to_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_gen.workers.pool.SILENT_SECONDS", 0.05)
    transport = Scripted(Random(0))
    transport.hanging = {1}
    found = sampled(transport, 200, 3)
    assert [answer.ids for answer in found] == [[i, 7] for i in range(200)]
    assert set(transport.answered.values()) == {1}
    assert not transport.hanging
    said = capsys.readouterr().err
    assert "WARNING: worker 1 died (silent for 0 minutes, ended); the " in said
    assert said.count("WARNING") == 1


def test_worker_that_says_it_is_alive_is_given_all_the_time_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_gen.workers.pool.SILENT_SECONDS", 0.05)
    transport, started = Scripted(Random(0)), time.monotonic()
    transport.hanging = {0}
    inner = transport.receive

    def receive(seconds: float) -> list[tuple[int, Message]]:
        if time.monotonic() - started > 0.2:
            transport.hanging.clear()
        return [*inner(seconds), (0, Alive())]

    monkeypatch.setattr(transport, "receive", receive)
    assert len(sampled(transport, 20, 1)) == 20
    assert "WARNING" not in capsys.readouterr().err


def test_what_workers_have_in_work_is_known_before_anything_has_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport = Scripted(Random(0))
    said = iter([[(0, Started(1, "here")), (1, Started(2, "here"))], [(0, Alive((70,)))],
                 [(1, Alive((30,)))]])  # fmt: skip
    monkeypatch.setattr(transport, "receive", lambda _: next(said))
    pool = Pool(transport, [Model("nowhere", "float32", 48, EngineConfig())], 2, None)
    seen = []
    for _ in range(3):
        pool.step()
        seen.append(pool.engines[0].in_flight)
    assert seen == [0, 70, 100]


def test_hours_hold_while_no_worker_has_started(
    config: RolloutsConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    transport = Scripted(Random(0))
    monkeypatch.setattr(transport, "start", lambda worker: None)

    def open_pool(models: list[Model], count: int, ray: str | None, note: Path | None) -> Pool:
        return Pool(transport, models, count, note)

    monkeypatch.setattr("data_gen.engines.open_pool", open_pool)
    rollouts(replace(config, output=str(tmp_path / "run"), workers=2, hours=1e-4))
    assert transport.closed
    assert "stopped after 0.0001 hours: 0 of 2 rounds are complete" in capsys.readouterr().out


def test_worker_holds_what_it_can_run_and_two_leases_and_leases_are_successive() -> None:
    transport = Scripted(Random(0), answers=3)
    sampled(transport, 200, 2)
    # 16 sequences of each of two models, and leases of 2.
    assert transport.most_held == 2 * (16 + 2 * 2)
    assert {b - a for lease in transport.leases for a, b in pairwise(lease)} == {2}
    assert max(map(len, transport.leases)) == 2


def test_worker_that_dies_again_and_again_ends_the_run() -> None:
    with pytest.raises(UserError, match=r"worker 0 died 3 times within 10 minutes, at last by sig"):
        sampled(Scripted(Random(0), deaths=99, answers=0), 20, 1)


def test_model_that_a_worker_cannot_load_ends_the_run_at_once() -> None:
    transport = Scripted(Random(0))
    transport.coming.append((0, Refused("vLLM cannot load 'x': no such file")))
    with pytest.raises(UserError, match=r"worker 0: vLLM cannot load 'x'"):
        sampled(transport, 20, 1)


def test_workers_share_devices_or_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpus(size: int, count: int, names: str, kv_gib: float | None = None) -> list[str]:
        config = EngineConfig(tensor_parallel_size=size, kv_gib=kv_gib)
        places = placement(config, count, names.split())
        return [place["CUDA_VISIBLE_DEVICES"] for place in places]

    assert gpus(1, 3, "4 5 6 7") == ["4", "5", "6"]
    assert gpus(2, 2, "4 5 6 7") == ["4,5", "6,7"]
    assert gpus(1, 3, "0 1", kv_gib=8) == ["0", "1", "0"]
    with pytest.raises(UserError, match=r"takes 6 GPUs, and 4 are visible; lower workers, or"):
        gpus(2, 3, "4 5 6 7")
    with pytest.raises(UserError, match=r"takes 4 GPUs, and 2 are visible"):
        gpus(4, 1, "0 1", kv_gib=8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert placement(EngineConfig(), 2, []) == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert placement(EngineConfig(), 20, [])[0] == {"OMP_NUM_THREADS": "3"}


def test_terminal_shows_a_line_per_worker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    pool = Pool(Scripted(Random(0)), [Model("nowhere", "float32", 48, EngineConfig())], 2, None)
    with Reporter("rollouts", 8, "solutions") as reporter:
        reporter.update(3, "12 tokens/s", pool.engines[0].lines)
        pool.step()
        reporter.update(4, "15 tokens/s", pool.engines[0].lines)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)  # colours
    for part in (
        "4/8",
        "15 tokens/s",
        "worker 0: 0 samples, 0 tokens/s, 0 held",
        "worker 1: 0 sam",
    ):
        assert part in said


def test_no_worker_is_refused(config: RolloutsConfig) -> None:
    with pytest.raises(UserError, match="workers is 0; give 1 or more"):
        replace(config, workers=0)
