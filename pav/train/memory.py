"""What training needs of a device's memory, before anything is loaded.

Activations are counted as the tensors that transformers' layers keep for the backward pass; the
coefficients were read off Llama, Qwen2 and Gemma 2 layers with ``saved_tensors_hooks`` (a test
repeats that). What a library keeps for itself is a constant.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

from pav.verifier.forward import TOKENS_PER_BATCH
from pav.verifier.lora import Lora
from pav.verifier.shape import GIB, Shape

Mode = Literal["frozen", "lora", "full"]
# CUDA context, workspaces and fragmentation.
_OTHER = 1 * GIB
# Bytes kept per token, layer and unit of: hidden size, query width, key and value width, MLP width.
# (Gemma 2 has twice the norms and, for its soft cap, attention in single steps.)
_KEPT = {
    ("plain", "32"): (24, 8, 8, 16),
    ("plain", "bf16-true"): (16, 4, 4, 8),
    ("plain", "bf16-mixed"): (26, 4, 4, 8),
    ("capped", "32"): (40, 16, 0, 16),
    ("capped", "bf16-true"): (36, 8, 0, 8),
    ("capped", "bf16-mixed"): (42, 8, 0, 8),
}
# Soft-capped attention also keeps scores: bytes per pair of tokens and head.
_PAIR = 8
# Scoring makes logits over the vocabulary half a GiB at a time, in three copies.
_LOGITS = 3 * GIB // 2


@dataclass(frozen=True)
class Work:
    """What a training run asks of its memory.

    Attributes:
        mode: what is trained.
        precision: Lightning precision.
        dtype: dtype of a frozen trunk.
        tokens: padded tokens of one forward pass.
        length: tokens of the longest trace.
        checkpointing: whether activations are recomputed.
        adapters: parameters of the adapters.
        shards: devices that share weights, gradients and optimiser (fsdp), else 1.
    """

    mode: Mode
    precision: str = "32-true"
    dtype: str = "float32"
    tokens: int = 8192
    length: int = 1024
    checkpointing: bool = False
    adapters: int = 0
    shards: int = 1


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    other: int = _OTHER

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.other

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations", "other")
        listed = ", ".join(f"{part} {getattr(self, part) / GIB:.1f}" for part in parts)
        return f"{self.total / GIB:.1f} GiB ({listed})"


def plan_memory(shape: Shape, work: Work) -> MemoryPlan:
    """Memory that ``work`` needs on one device (bytes)."""
    half = not work.precision.startswith("32")
    true = work.precision.endswith("-true")
    if work.mode == "frozen":
        size = 4 if work.dtype == "float32" else 2
        layer = size * work.tokens * (4 * shape.hidden + shape.query + 2 * shape.key)
        layer += size * work.tokens * 3 * shape.mlp + _attention(shape, work)
        return MemoryPlan(size * shape.parameters, 0, 0, layer + _LOGITS)
    activations = _activations(shape, work)
    if work.mode == "lora":
        weights = (2 if half else 4) * shape.parameters + 4 * work.adapters
        return MemoryPlan(weights, 4 * work.adapters, 8 * work.adapters, activations)
    size = 2 if half and true else 4
    own = -(-shape.parameters // work.shards)
    weights = size * own
    if half and not true:
        weights += 2 * own  # autocast's copies
    if work.shards > 1:
        # Whole only while they compute: two layers, and the embeddings.
        layer = (shape.parameters - shape.embedding) // shape.layers
        weights += size * (2 * layer + shape.embedding)
    return MemoryPlan(weights, size * own, 2 * size * own, activations)


def _attention(shape: Shape, work: Work) -> int:
    return _PAIR * shape.heads * work.length * work.tokens if shape.capped else 0


def _activations(shape: Shape, work: Work) -> int:
    precision = "32" if work.precision.startswith("32") else work.precision.replace("16-", "bf16-")
    precision = precision.replace("bfbf", "bf")
    kept = _KEPT["capped" if shape.capped else "plain", precision]
    widths = (shape.hidden, shape.query, shape.key, shape.mlp)
    layer = work.tokens * sum(a * b for a, b in zip(kept, widths, strict=True))
    layer += _attention(shape, work)
    if not work.checkpointing:
        return shape.layers * layer
    size = 2 if precision == "bf16-true" else 4
    # A layer is recomputed at a time; of the others only the input is kept.
    return layer + shape.layers * size * work.tokens * shape.hidden


def ways_out(shape: Shape, work: Work, lora: Lora, budget: int) -> list[str]:
    """Settings that make a plan fit that does not, least change first.

    Args:
        shape: the trunk.
        work: what does not fit.
        lora: the adapters, were it to be lora.
        budget: bytes of a device.
    """
    found = []
    trained = work.mode != "frozen"
    lighter = replace(work, checkpointing=True)
    small = replace(lighter, tokens=max(work.length, work.tokens // 4))
    adapters = replace(
        small,
        mode="lora",
        precision="bf16-mixed",
        adapters=shape.adapter_parameters(lora),
        shards=1,
    )
    checkpoint = "--gradient_checkpointing true"
    tokens = f"--tokens_per_batch {small.tokens}"
    options = [
        (trained and not work.checkpointing, lighter, checkpoint),
        (trained, small, f"{checkpoint} {tokens}"),
        (
            work.mode == "full" and work.precision != "bf16-true",
            replace(small, precision="bf16-true"),
            f"{checkpoint} {tokens} --precision bf16-true",
        ),
        (
            work.mode == "full" and work.shards < 8,
            replace(small, shards=8),
            f"{checkpoint} {tokens} --strategy fsdp --devices 8",
        ),
        (
            work.mode == "full" or not work.precision.startswith("bf16"),
            adapters,
            f"--trunk_mode lora --precision bf16-mixed {checkpoint} {tokens}",
        ),
        (
            True,
            replace(
                work, mode="frozen", dtype="bfloat16", tokens=max(work.length, TOKENS_PER_BATCH)
            ),
            "--trunk_mode frozen --dtype bfloat16",
        ),
    ]
    for applies, other, how in options:
        if applies and other != work and plan_memory(shape, other).total <= budget:
            found.append(f"{how} ({plan_memory(shape, other).total / GIB:.1f} GiB)")
    return found


def device_memory(gpu: bool) -> int:
    """Bytes of the first GPU, or of this machine."""
    if gpu:
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
