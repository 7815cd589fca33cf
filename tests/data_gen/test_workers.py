"""Label runs over several workers: real processes and Ray actors with real vLLM, killed midway."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_gen.config import RolloutsConfig
from data_gen.inspect.status import StatusConfig, status
from data_gen.rollouts import rollouts
from pav.core.errors import UserError
from pav.core.journal import JOURNAL, journal_lines
from pav.engine import pool
from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.engine.pool import WORKERS, Pool, transport
from pav.engine.processes import placement
from pav.engine.remote import Model, RemoteEngine, remote_engines
from pav.engine.vllm import VllmEngine
from pav.engine.worker import Lease, Load, Message
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
        if not killed and worker.started and worker.answers and worker.holds:
            killed.append(worker.started.process)
            os.kill(worker.started.process, signal.SIGKILL)
            answered = other.answers
        elif then_terminate and worker.deaths and other.answers > answered + 40:
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


def test_silent_worker_is_started_again_and_asked_for_what_it_held(
    config: RolloutsConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pool, "SILENT_SECONDS", 8.0)
    model = Model(config.policy.model, "float32", 48, config.engine)
    (engine,) = remote_engines(transport(config.engine, 1, None), [model], 1)
    stopped: list[int] = []
    inner = Pool._resolve

    def stop(self: Pool, worker: Any, number: int, answer: Any) -> None:
        inner(self, worker, number, answer)
        if not stopped and worker.holds:
            stopped.append(worker.started.process)
            os.kill(worker.started.process, signal.SIGSTOP)

    monkeypatch.setattr(Pool, "_resolve", stop)

    async def job(seed: int) -> Sampled:
        return await engine.sample([5, 6], Sampler(), stop_ids=[2], max_tokens=20, seed=seed)

    found: list[Sampled] = []
    drive([engine], [partial(job, seed) for seed in range(30)], found.append, 30)
    engine.shutdown()
    assert len(found) == 30
    assert engine.usage.generated == sum(len(answer.ids) for answer in found)
    said = capfd.readouterr().err
    assert "WARNING: worker 0 died (silent for 0 minutes, ended); the " in said
    assert "it starts again (1 of 2 times)" in said
    assert len(stopped) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(stopped[0], 0)


class NeverStarted:
    """Workers of which none ever starts."""

    closed = False

    def start(self, worker: int) -> None:
        pass

    def send(self, worker: int, message: Load | Lease) -> None:
        pass

    def receive(self, seconds: float) -> list[tuple[int, Message]]:
        return []

    def end(self, worker: int) -> None:
        raise AssertionError("a worker that never started is not silent")

    def close(self) -> None:
        self.closed = True


def test_hours_hold_while_no_worker_has_started(
    config: RolloutsConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # As on a cluster without room.
    never = NeverStarted()
    monkeypatch.setattr("data_gen.engines.transport", lambda *_: never)
    rollouts(replace(config, output=str(tmp_path / "run"), workers=2, hours=1e-4))
    assert never.closed
    assert "stopped after 0.0001 hours: 0 of 2 rounds are complete" in capsys.readouterr().out


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


def test_no_worker_is_refused(config: RolloutsConfig) -> None:
    with pytest.raises(UserError, match="workers is 0; give 1 or more"):
        replace(config, workers=0)
