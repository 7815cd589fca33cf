"""The engines of a label run: in this process, or in workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from data_gen.config import RolloutsConfig
from data_gen.labeler import RolloutPolicy
from pav.engine.gpu_memory import share_gpu
from pav.engine.pool import WORKERS, transport
from pav.engine.remote import Model, RemoteEngine, remote_engines
from pav.engine.vllm import VllmEngine
from pav.policy.policy import Policy


@contextmanager
def loaded(config: RolloutsConfig, policies: list[Policy]) -> Iterator[list[RolloutPolicy]]:
    """An engine for each policy, shut down at the end, however that comes."""
    rollout_policies: list[RolloutPolicy] = []
    try:
        for p, engine in zip(policies, _engines(config, policies), strict=True):
            rollout_policies.append(RolloutPolicy(p, engine, config.sampler))
        yield rollout_policies
    finally:
        for rollout_policy in rollout_policies:
            rollout_policy.engine.shutdown()


def _engines(config: RolloutsConfig, policies: list[Policy]) -> Iterator[VllmEngine | RemoteEngine]:
    """Engines in this process, one after the other, or those of workers."""
    if config.workers > 1 or config.ray is not None:
        yield from _in_workers(config, policies)
        return
    length = config.sampler.max_length
    served = [(p.path, p.config.dtype) for p in policies]
    shared = share_gpu(config.engine, served, length)
    for (path, dtype), settings in zip(served, shared, strict=True):
        engine = VllmEngine(path, dtype, length, config=settings)
        engine.start()
        yield engine


def _in_workers(config: RolloutsConfig, policies: list[Policy]) -> Sequence[RemoteEngine]:
    length = config.sampler.max_length
    models = [Model(p.path, p.config.dtype, length, config.engine, (p.stepper,)) for p in policies]
    note = None if config.dry_run else config.directory / WORKERS
    reached = transport(config.engine, config.workers, config.ray)
    return remote_engines(reached, models, config.workers, note)
