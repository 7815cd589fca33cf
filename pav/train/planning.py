"""What training will take, said before it starts: padding and memory."""

from __future__ import annotations

from transformers import AutoConfig

from pav.core.errors import UserError
from pav.labels.examples import Example
from pav.train.batches import MAX_WASTE
from pav.train.config import TrainConfig
from pav.train.memory import MemoryPlan, Work, device_memory, plan_memory, ways_out
from pav.verifier.forward import TOKENS_PER_BATCH, batches, padding_waste
from pav.verifier.lora import check_targets
from pav.verifier.shape import GIB, shape_of
from pav.verifier.trunk import refuse_unservable


def plan(config: TrainConfig, path: str, examples: list[Example], gpu: bool) -> MemoryPlan:
    """Print padding and memory, and refuse what does not fit.

    Raises:
        UserError: naming settings that would fit.
    """
    longest = max(len(e.ids) for e in examples)
    if not config.frozen:
        parts = list(batches(examples, None, config.tokens_per_batch, MAX_WASTE))
        print(
            f"{len(parts)} batches of up to {max(config.tokens_per_batch, longest)} tokens, "
            f"{padding_waste(parts):.1%} of them padding"
        )
    if config.trunk_mode == "full" and config.precision == "bf16-true":
        print(
            "WARNING: bf16-true keeps 8 bits of a weight: updates below 1/256 of it are lost; "
            "bf16-mixed keeps them"
        )
    described = AutoConfig.from_pretrained(path, trust_remote_code=False)
    refuse_unservable(described)
    shape = shape_of(described)
    if config.trunk_mode == "lora":
        check_targets(config.lora, shape.linear_widths)
    work = Work(
        config.trunk_mode,
        config.precision,
        config.dtype if gpu else "float32",
        max(TOKENS_PER_BATCH if config.frozen else config.tokens_per_batch, longest),
        longest,
        config.gradient_checkpointing,
        shape.adapter_parameters(config.lora) if config.trunk_mode == "lora" else 0,
        config.processes if config.strategy == "fsdp" else 1,
    )
    planned = plan_memory(shape, work)
    budget = int(config.memory_gib * GIB) if config.memory_gib else device_memory(gpu)
    print(f"memory: about {planned} of {budget / GIB:.1f} GiB")
    if planned.total > budget:
        ways = ways_out(shape, work, config.lora, budget)
        raise UserError(
            f"training {path!r} needs about {planned}, and a device has "
            f"{budget / GIB:.1f} GiB (memory_gib); "
            + (f"these fit: {'; '.join(ways)}" if ways else "take a smaller trunk")
        )
    return planned
