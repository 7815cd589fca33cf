"""The engines of a label run: in this process, or in workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_gen.config import RolloutsConfig
from data_gen.labeler import RolloutPolicy
from data_gen.workers import worker
from data_gen.workers.pool import WORKERS, Model, Pool, RemoteEngine
from pav.engine.gpu_memory import share_gpu
from pav.engine.processes import Processes, placement, visible_devices
from pav.engine.vllm import VllmEngine
from pav.policy.policy import (
    Policy,
)


@contextmanager
def loaded(config: RolloutsConfig, policies: list[Policy]) -> Iterator[list[RolloutPolicy]]:
    """An engine for each policy, shut down at the end, however that comes."""
    rollers: list[RolloutPolicy] = []
    try:
        for p, engine in zip(policies, _engines(config, policies), strict=True):
            rollers.append(RolloutPolicy(p, engine, config.sampler))
        yield rollers
    finally:
        for roller in rollers:
            roller.engine.shutdown()


def _engines(config: RolloutsConfig, policies: list[Policy]) -> Iterator[VllmEngine | RemoteEngine]:
    """Engines in this process, one after the other, or those of workers."""
    length = config.sampler.max_length
    if config.workers == 1 and config.ray is None:
        served = [(p.path, p.config.dtype) for p in policies]
        shared = share_gpu(config.engine, served, length)
        for (path, dtype), settings in zip(served, shared, strict=True):
            engine = VllmEngine(path, dtype, length, config=settings)
            engine.start()
            yield engine
        return
    models = [Model(p.path, p.config.dtype, length, config.engine, p.stepper) for p in policies]
    note = None if config.dry_run else config.directory / WORKERS
    yield from open_pool(models, config.workers, config.ray, note).engines


def open_pool(models: Sequence[Model], count: int, ray: str | None, note: Path | None) -> Pool:
    """Start ``count`` workers on this machine, or on the Ray cluster at ``ray``.

    Args:
        models: what every worker loads.
        count: workers.
        ray: address of a cluster, or None.
        note: see :class:`~data_gen.workers.pool.Pool`.

    Raises:
        UserError: if there are too few GPUs, no Ray, or no cluster.
    """
    if ray is None:
        places = placement(models[0].config, count, visible_devices())
        return Pool(Processes(worker.__name__, list(models), places), models, count, note)
    from data_gen.workers.ray_workers import Actors

    return Pool(Actors(ray, models), models, count, note)
