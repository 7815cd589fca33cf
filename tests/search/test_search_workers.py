"""Searches over several workers: real processes and Ray actors with real vLLM, killed midway."""

from __future__ import annotations

import os
import pickle
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.engine.pool import Pool
from pav.engine.processes import Processes
from pav.engine.ray import Actors
from pav.engine.vllm import VllmEngine
from pav.engine.worker import Started
from pav.policy.policy import Sampler
from pav.tasks.base import Problem
from search.beam import BeamConfig
from search.compare import command as comparison
from search.compare.command import CompareConfig, Method, compare
from search.run.config import manifest
from search.run.records import Record, read
from search.run.workers import Workers

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


def kill_a_worker(patch: pytest.MonkeyPatch) -> list[int]:
    """Kills worker 0 in the last search, while it holds problems.

    Nothing waits for the one in its place then.
    """
    killed: list[int] = []
    give = Pool._give

    def given(self: Pool, queue: int) -> None:
        give(self, queue)
        worker = self._workers[0]
        if self._job.number == 3 and not killed and worker.started and worker.holds:
            killed.append(worker.started.process)
            os.kill(worker.started.process, signal.SIGKILL)

    patch.setattr(Pool, "_give", given)
    return killed


def test_killed_worker_and_another_number_of_workers_make_the_records_of_one_process(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Plots are others' business.
    monkeypatch.setattr(comparison, "_report", lambda *_: None)
    compare(config)
    wanted = records(config)
    two = replace(config, output=str(Path(config.output).with_name("two")), workers=2)
    started: list[int] = []
    with monkeypatch.context() as patch:
        start = Processes.start

        def counted(self: Processes, worker: int) -> None:
            started.append(worker)
            start(self, worker)

        patch.setattr(Processes, "start", counted)
        killed = kill_a_worker(patch)
        compare(two)
    assert "WARNING: worker 0 died (signal SIGKILL); the " in capfd.readouterr().err
    # All searches are those of two workers and of one in the place of the first.
    assert started == [0, 1, 0]
    (process,) = killed
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert records(two) == wanted

    # Another number of workers goes on; what is there is not searched again.
    path = next(Path(two.output).glob("beam-*.jsonl"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    compare(replace(two, workers=1))
    assert path.read_bytes().splitlines(keepends=True)[:3] == lines[:3]
    assert records(two) == wanted


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (extra 'ray')")
def test_comparison_on_a_ray_cluster_makes_the_records_of_one_process_and_loads_once(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_report", lambda *_: None)
    compare(config)
    started: Counter[int] = Counter()
    loaded: dict[int, set[int]] = {}
    start, take_in = Actors.start, Pool._take_in

    def counted(self: Actors, worker: int) -> None:
        started[worker] += 1
        start(self, worker)

    def noted(self: Pool, worker: int, message: Started) -> None:
        loaded.setdefault(message.job, set()).add(message.process)
        take_in(self, worker, message)

    monkeypatch.setattr(Actors, "start", counted)
    monkeypatch.setattr(Pool, "_take_in", noted)
    ray = replace(config, output=str(Path(config.output).with_name("ray")), ray="local")
    compare(ray)
    assert records(ray) == records(config)
    assert started == {0: 1}
    # A beam, two sets of samples and their scores, all by one process beside this one.
    assert len(loaded) == 4
    ((process,),) = set(map(frozenset, loaded.values()))
    assert process != os.getpid()


def test_an_engine_that_arrives_with_every_search_is_one_engine() -> None:
    engine = VllmEngine("nowhere", "float32", 48, [3, 4], EngineConfig(kv_gib=1.0))
    first, second = (pickle.loads(pickle.dumps(engine)) for _ in range(2))  # noqa: S301
    assert first is second


def test_run_directory_does_not_depend_on_workers_and_ray() -> None:
    asked = BeamConfig(verifier="pav:reference")
    there = replace(asked, workers=16, ray="auto", concurrency=4)
    assert manifest(there, None) == manifest(asked, None)


async def nothing(problem: Problem) -> Record:
    raise AssertionError("is not searched here")


def test_what_cannot_be_sent_is_refused(config: CompareConfig) -> None:
    workers = Workers(1, config.engine)
    with pytest.raises(UserError, match=r"cannot be sent to workers .*use --workers 1 without"):
        workers.open(lambda: None, nothing)
    with pytest.raises(UserError, match="workers is 0; give 1 or more"):
        BeamConfig(workers=0)
    with pytest.raises(UserError, match="ray is ''; give the address of a running cluster"):
        BeamConfig(ray="")
