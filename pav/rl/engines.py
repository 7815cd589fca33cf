"""The engines that serve the policy: in the training process, or in workers of their own."""

from __future__ import annotations

from pav.core.errors import UserError
from pav.core.steps import Ending
from pav.engine.loading import EngineConfig
from pav.engine.pool import Transport, transport
from pav.engine.processes import Processes, placement, visible_devices
from pav.engine.remote import Model, RemoteEngine, remote_engines
from pav.engine.vllm import VllmEngine
from pav.policy.policy import Policy, Sampler
from pav.rl.config import RlConfig

Serving = VllmEngine | RemoteEngine


def serving(
    config: RlConfig,
    policy: Policy,
    sampler: Sampler,
    here: EngineConfig,
    local_rank: int,
    endings: tuple[Ending, ...],
) -> Serving:
    """What serves the policy to one training process; nothing is loaded yet.

    Args:
        config: settings.
        policy: what is served.
        sampler: its length cap.
        here: settings of an engine in this process.
        local_rank: which of the training processes of this machine asks.
        endings: where what is sampled may end.

    Raises:
        UserError: if there are too few GPUs.
    """
    path, dtype, length = policy.path, policy.config.dtype, sampler.max_length
    if not config.workers:
        return VllmEngine(path, dtype, length, config=here, trained=True)
    model = Model(path, dtype, length, config.engine, endings, trained=True)
    return remote_engines(_reached(config, local_rank), [model], config.workers)[0]


def _reached(config: RlConfig, local_rank: int) -> Transport:
    """Workers on Ray, or on the GPUs of this machine that no training process takes."""
    if config.ray is not None:
        return transport(config.engine, config.workers, config.ray)
    devices = visible_devices()
    size = config.workers * config.engine.tensor_parallel_size
    mine = devices[config.devices + local_rank * size :][:size]
    if devices and len(mine) < size:
        raise UserError(
            f"{config.devices} training processes with workers {config.workers} of "
            f"engine.tensor_parallel_size {config.engine.tensor_parallel_size} each take "
            f"{config.devices * (1 + size)} GPUs, and {len(devices)} are visible; lower devices or "
            "workers, or leave workers out: engines are then in the training processes"
        )
    return Processes(placement(config.engine, config.workers, mine))
