"""What is trained, as processes hold it: a copy each (DDP), or a share each (FSDP2).

Shares are of weights, gradients and optimiser; a layer is whole only while it computes. Whoever
asks for a whole tensor (:func:`pav.rl.processes.whole`) asks in all processes at once: they gather
it together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from pav.core.seeds import seed_of
from pav.rl.checkpoint import State, load
from pav.rl.config import RlConfig
from pav.rl.learner import Learner, Reference


def strategy_of(config: RlConfig) -> Strategy | str:
    """Fabric's strategy: shares, copies (DDP), or one process."""
    if not config.is_sharded:
        return "auto" if config.processes == 1 else "ddp"
    # Its defaults shard over nodes alone: nothing on one machine.
    return ModelParallelStrategy(
        lambda learner, mesh: sharded(learner, mesh["data_parallel"]),
        data_parallel_size=config.processes,
        tensor_parallel_size=1,
    )


def set_up(
    config: RlConfig, fabric: Fabric, path: str, temperature: float, checkpoint: Path
) -> tuple[State, Learner, Any, Any, Reference | None, dict[str, Tensor] | None]:
    """State, policy, the same as set up by ``fabric``, its optimiser, its reference, and the
    weights of the start where the engine samples from these.

    Args:
        config: settings.
        fabric: of the processes that train together.
        path: of the start.
        temperature: at which it samples.
        checkpoint: to go on from, where there is one.
    """
    torch.manual_seed(seed_of(config.seed, "start") % 2**31)
    learner = Learner(
        path, temperature, config.estimator == "value", config.lora, config.gradient_checkpointing
    )
    reference = Reference(learner) if config.kl else None
    start = None
    if config.reward == "sft" and config.sft_chain == "own":
        start = {name: tensor.clone() for name, tensor in learner.served().items()}
    state, moments = load(checkpoint, learner)
    wrapped = fabric.setup_module(learner)
    if config.is_sharded and reference is not None and reference.copy is not None:
        strategy: Any = fabric.strategy
        sharded(reference.copy, strategy.device_mesh["data_parallel"])
    trained = learner.trained()
    value = [p for name, p in trained.items() if name.startswith("value.")]
    rest = [p for name, p in trained.items() if not name.startswith("value.")]
    groups = [{"params": rest, "lr": config.lr, "peak": config.lr}]
    if value:
        groups.append({"params": value, "lr": config.value_lr, "peak": config.value_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    if moments is not None:
        restore(optimizer, moments)
    return state, learner, wrapped, fabric.setup_optimizers(optimizer), reference, start


def sharded(learner: Learner, mesh: DeviceMesh) -> Learner:
    """The same policy, a share of it on each device of ``mesh``."""
    decoder: Any = learner.policy.get_decoder()
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    # The outermost weights (embeddings) are given back after every pass, too: what is read of them
    # between passes is always a share.
    fully_shard(learner, mesh=mesh, reshard_after_forward=True)
    return learner


def restore(optimizer: Optimizer, plain: dict[str, Any]) -> None:
    """Load an optimiser's state, of whole tensors, into one that may hold shares."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def like(value: Any, parameter: Tensor) -> Any:
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements
        )

    state = {
        i: {name: like(value, parameters[i]) for name, value in values.items()}
        for i, values in plain["state"].items()
    }
    optimizer.load_state_dict({**plain, "state": state})
