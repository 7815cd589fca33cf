"""What is used of vLLM beyond its documented API, all of it; ``CHECKED`` says with which versions.

The classes and arguments that :mod:`pav.engine.loading` and :mod:`pav.engine.vllm` import from
``vllm`` and ``vllm.sampling_params`` are documented.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pav.engine.weights import OUTPUT

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from torch import Tensor

CHECKED = ">=0.32,<0.34"


def unsupported_head_size(planned: Any) -> str:
    """The sizes of heads that attention takes on this device, if the model's is none of them.

    Args:
        planned: vLLM's configuration of an engine.
    """
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    model = planned.model_config
    if model.is_attention_free or model.use_mla:
        return ""  # no attention, or one whose heads have several sizes
    size = model.get_head_size()
    with set_current_vllm_config(planned):
        # On a GPU this raises where no backend fits; that of CPUs takes whatever it is given.
        backend = get_attn_backend(size, model.dtype, planned.cache_config.cache_dtype)
    if backend.supports_head_size(size):
        return ""
    return ", ".join(map(str, backend.get_supported_head_sizes()))


def tokens_in_flight(engine: Any) -> int:
    """Tokens that an engine's requests have so far; 0 where this version does not say."""
    try:
        states = engine.output_processor.request_states.values()
        return sum(s.detokenizer.num_output_tokens() for s in states if s.detokenizer)
    except AttributeError:  # only a progress line is less exact
        return 0


def replace_weights(engine: Any, state: Mapping[str, Tensor]) -> None:
    """Give an engine other weights, in place. vLLM copies them.

    Args:
        engine: vLLM's, without requests and with an empty prefix cache.
        state: tensors by name, complete and of the right shapes (vLLM would not say).
    """
    # Gemma 2 reads its embedding instead, and its loader knows no such name.
    tensors = dict(state)
    if not all(engine.apply_model(_has_output_matrix)):
        tensors.pop(OUTPUT, None)
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": list(tensors.items())})


def _has_output_matrix(model: Any) -> bool:
    return hasattr(model, OUTPUT.partition(".")[0])


def stamp_weights(engine: Any, version: int) -> None:
    """Have an engine mark what its weights sample with ``version``."""
    engine.set_weight_version(str(version))


def weight_versions(completion: Any) -> set[int]:
    """Versions of the weights that sampled a completion; none where vLLM did not finish it."""
    return {int(span.version) for span in completion.weight_versions or ()}


def shutdown(engine: Any) -> None:
    """Free the device of an engine, or of None."""
    core = getattr(engine, "engine_core", None)
    if core is not None:
        core.shutdown()


def device_memory() -> int:
    """Memory of the first GPU."""
    from vllm.platforms import current_platform

    # It asks the driver: a process that only leads workers takes no memory of the GPU.
    return int(current_platform.get_device_total_memory())


def load_kernels() -> bool:
    """Load the kernels of this machine; whether they are there."""
    import torch
    from vllm.platforms import current_platform

    # It knows which of its builds this machine can run; importing another one is fatal.
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "rms_norm")
