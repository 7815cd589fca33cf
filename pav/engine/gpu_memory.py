"""How engines that sit on one GPU share its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pav.core.errors import UserError
from pav.engine.loading import UTILIZATION, EngineConfig, gpu_bytes, on_cpu
from pav.policy.policy import Dtype
from pav.verifier.shape import GIB, shape_of

# What vLLM takes beside weights and KV cache: activations, logits, CUDA graphs. It measures its own
# and takes the difference from the KV cache, so this only has to be about right.
WORKSPACE = 3 * GIB // 2
WORKSPACE_SHARE = 0.1


@dataclass(frozen=True)
class Planned:
    """An engine that is to be loaded.

    Attributes:
        name: the model, for messages.
        weights: bytes on one GPU.
        kv_token: bytes of KV cache per token on one GPU.
    """

    name: str
    weights: int
    kv_token: int


def gpu_shares(engines: Sequence[Planned], total: int, max_length: int) -> list[float]:
    """Each engine's share of a GPU: its weights and workspace, and of the rest KV cache for as many
    tokens as the others have.

    Args:
        engines: all that will be on the GPU at a time.
        total: bytes of the GPU.
        max_length: tokens of the longest sequence; an engine must hold at least one.

    Raises:
        UserError: if they do not fit.
    """
    workspace = min(WORKSPACE, int(total * WORKSPACE_SHARE))
    fixed = [engine.weights + workspace for engine in engines]
    rest = total * UTILIZATION - sum(fixed)
    tokens = rest / sum(engine.kv_token for engine in engines)
    if tokens < max_length:
        listed = ", ".join(f"{e.name} {e.weights / GIB:.1f}" for e in engines)
        raise UserError(
            f"{len(engines)} models do not fit on one GPU of {total / GIB:.1f} GiB (weights in "
            f"GiB: {listed}; beside each {workspace / GIB:.1f} and KV cache for {max_length} "
            "tokens); use dtype bfloat16, raise engine.tensor_parallel_size, or say how much each "
            "may take with engine.kv_gib or engine.gpu_memory_utilization"
        )
    return [(own + tokens * e.kv_token) / total for own, e in zip(fixed, engines, strict=True)]


def planned(model: str, dtype: Dtype, tensor_parallel_size: int) -> Planned:
    """Sizes of a model (directory or hub id) on each of its GPUs; its weights are not read."""
    from transformers import AutoConfig

    shape = shape_of(AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config())
    size = 4 if dtype == "float32" else 2
    return Planned(
        model,
        size * shape.parameters // tensor_parallel_size,
        2 * size * shape.layers * shape.key // tensor_parallel_size,
    )


def share_gpu(
    config: EngineConfig,
    models: Sequence[tuple[str, Dtype]],
    max_length: int,
    beside: Sequence[Planned] = (),
    say: bool = True,
) -> list[EngineConfig]:
    """Settings of each of ``models``, which are served on the same GPU (or GPUs).

    What the user has set stays; a CPU is not shared out, its KV caches are small.

    Args:
        config: settings of all of them.
        models: (directory or hub id, dtype) of each engine.
        max_length: tokens of the longest sequence.
        beside: what else is on the GPU, without a KV cache.
        say: print the shares.

    Raises:
        UserError: if they do not fit.
    """
    if on_cpu() or not config.planned or len(models) + len(beside) < 2:
        return [config] * len(models)
    total = gpu_bytes()
    engines = [planned(model, dtype, config.tensor_parallel_size) for model, dtype in models]
    engines += beside
    shares = gpu_shares(engines, total, max_length)
    listed = ", ".join(
        f"{engine.name!r} {share * total / GIB:.1f} (weights {engine.weights / GIB:.1f})"
        for engine, share in zip(engines, shares, strict=True)
    )
    if say:
        print(f"GPU memory of {total / GIB:.1f} GiB: {listed}")
    return [replace(config, gpu_memory_utilization=share) for share in shares[: len(models)]]
