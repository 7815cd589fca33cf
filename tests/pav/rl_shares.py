"""Updates of ``pav.rl`` in one process or in several, without an engine.

Usage: torchrun ... -m tests.pav.rl_shares STRATEGY MODEL OUTPUT; STRATEGY is ddp or fsdp, or one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from pav.core.errors import UserError
from pav.rl.checkpoint import save, snapshot
from pav.rl.config import RlConfig
from pav.rl.shards import set_up, strategy_of
from pav.rl.sync import check_mismatch
from pav.rl.update import Sample, Sums, update


def some(seed: int) -> list[Sample]:
    """Six traces of different lengths."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(6):
        prompt, length = int(rng.integers(2, 6)), int(rng.integers(3, 12))
        ids = rng.integers(3, 15, prompt + length).tolist()
        sampled = rng.normal(-2, 0.1, length).astype(np.float32)
        found.append(Sample(ids, prompt, sampled, rng.normal(size=length), 1 / 6))
    return found


def main(strategy: Any, model: str, output: str) -> None:
    devices = 1 if strategy == "one" else 2
    config = RlConfig(
        "v", strategy="auto" if strategy == "one" else strategy, devices=devices, kl=0.1, lr=1e-3,
        estimator="value", tokens_per_batch=20, max_grad_norm=0.01,
    )  # fmt: skip
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy_of(config))
    fabric.launch()
    file = Path(output) / f"{strategy}.ckpt"

    def step(trained: Any, seed: int) -> None:
        _, _, wrapped, optimizer, reference, _ = trained
        # Of two processes one has five times the other's batches.
        mine = some(seed) if devices == 1 else [some(seed)[:5], some(seed)[5:]][fabric.global_rank]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"]
        update(fabric, wrapped, optimizer, reference, mine, config)

    def keep(trained: Any, path: Path) -> None:
        state, learner, _, optimizer, *_ = trained
        plain = snapshot(state, learner, optimizer, fabric.is_global_zero)
        served = learner.served()
        if fabric.is_global_zero:
            save(path, {**plain, "served": served})
        fabric.barrier()

    first = set_up(config, fabric, model, 1.0, file)
    step(first, 0)
    keep(first, file)
    resumed = set_up(config, fabric, model, 1.0, file)
    for name, trained in (("on", first), ("resumed", resumed)):
        step(trained, 1)
        keep(trained, file.with_suffix(f".{name}"))
    # What one process alone sees ends all of them.
    wrong = Sums(tokens=10.0, mismatch=10.0 if fabric.global_rank == devices - 1 else 0.0)
    try:
        check_mismatch(fabric, wrong, 0.1, "float32")
    except UserError:
        (Path(output) / f"{strategy}-{fabric.global_rank}.ended").touch()
    if devices > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
