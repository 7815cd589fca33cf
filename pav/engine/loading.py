"""A model into vLLM: an engine's settings, what cannot be served, vLLM's refusals in one line."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import textwrap
import traceback
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

from pav.core.errors import UserError
from pav.engine.processor import check_processor, is_emulated
from pav.engine.vllm_internals import device_memory, load_kernels, unsupported_head_size
from pav.policy.policy import Dtype

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from vllm import EngineArgs, LLMEngine

# Share of a GPU for all engines on it where nothing is set.
UTILIZATION = 0.85


def on_cpu() -> bool:
    """Whether engines compute on the CPU."""
    # Not at the top: who only asks for --help need not wait for torch.
    import torch

    return not torch.cuda.is_available()


@cache
def prepare_process() -> None:
    """Settle what vLLM and torch have to know in a process that starts an engine.

    Called before vLLM is imported. What the user has set stays.
    """
    # One process, so that a repeat of a run is bit-identical.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Read where torch is imported: without it vLLM on a CPU tells about memory nodes.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not on_cpu():
        return
    import torch

    # It tells that Triton, which compiles for GPUs, is not there.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    # The only compiled function left on the CPU path counts ranks, which we do not read; eager
    # spares the user a C++ compiler and half a minute.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    # The variable is for vLLM: torch has read it when it was imported.
    torch._dynamo.config.disable = os.environ["TORCH_COMPILE_DISABLE"] == "1"
    # vLLM would bind its threads to cores of its own choice; the user's OMP_NUM_THREADS rules.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@dataclass(frozen=True)
class EngineConfig:
    """How an engine uses its device.

    Args:
        kv_gib: KV cache in GiB of each engine; None plans it (1 on a CPU).
        gpu_memory_utilization: share of a GPU that each engine may take where ``kv_gib`` is None;
            None splits .85 of it among the engines that are on it, by weights and KV cache.
        tensor_parallel_size: GPUs of one engine.
        max_num_seqs: sequences per step.
        block_size: tokens per KV block; prefixes are cached in whole blocks.
        enforce_eager: no CUDA graphs.
    """

    kv_gib: float | None = None
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    max_num_seqs: int = 256
    block_size: int | None = None
    enforce_eager: bool = False

    @property
    def planned(self) -> bool:
        """Whether how much of a GPU an engine takes is left to us."""
        return self.kv_gib is None and self.gpu_memory_utilization is None


def engine_arguments(
    model: str, dtype: Dtype, max_length: int, config: EngineConfig, trained: bool = False
) -> EngineArgs:
    """What vLLM is told of an engine; see :class:`~pav.engine.vllm.VllmEngine`."""
    prepare_process()
    from vllm import EngineArgs

    cpu = on_cpu()

    kv_gib = config.kv_gib or (1.0 if cpu else None)
    arguments: dict[str, Any] = {}
    if kv_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(kv_gib * (1 << 30))
        # vLLM checks this share against free memory even where the KV size is given, which would
        # refuse a second engine on a device.
        arguments["gpu_memory_utilization"] = 0.05
    else:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization or UTILIZATION
    if config.block_size or cpu:
        arguments["block_size"] = config.block_size or 32
    if trained and not cpu:
        arguments["enable_sleep_mode"] = True  # the trainer may be on the same device
    if cpu:
        # A prefill cut in two rewinds the request's generator, which CPU generators cannot.
        arguments["enable_chunked_prefill"] = False
    return EngineArgs(
        model=model,
        dtype=dtype,
        skip_tokenizer_init=True,
        generation_config="vllm",
        max_model_len=max_length,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=max(4096, max_length),
        # Pickled weights, as a hub may hold, could run code.
        load_format="safetensors",
        enable_prefix_caching=True,
        # Processed ones are of the distribution that is sampled from. Raw ones are of temperature
        # 1, and of all tokens: heads are read off them.
        logprobs_mode="processed_logprobs" if trained else "raw_logprobs",
        tensor_parallel_size=config.tensor_parallel_size,
        enforce_eager=config.enforce_eager or cpu,
        seed=0,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **arguments,
    )


def check_model(model: str, dtype: Dtype, max_length: int, config: EngineConfig) -> None:
    """Refuse what vLLM cannot serve on this device, before weights are read or files written.

    vLLM is asked itself: for the engine's configuration, and whether its attention takes the model.

    Raises:
        UserError: with vLLM's reason.
    """
    prepare_process()
    if on_cpu():
        check_processor()
    # vLLM writes settings for its own process there, which workers would inherit.
    environment = dict(os.environ)
    try:
        _ask(engine_arguments(model, dtype, max_length, config))
    except UserError:
        raise
    except Exception as error:
        raise _refusal(model, error, "sampler.max_length, dtype and engine decide, too") from error
    finally:
        os.environ.clear()
        os.environ.update(environment)


def _ask(arguments: EngineArgs) -> None:
    planned = arguments.create_engine_config()
    if sizes := unsupported_head_size(planned):
        raise UserError(
            f"vLLM cannot serve {arguments.model!r} on this device: its head_dim is "
            f"{planned.model_config.get_head_size()}, and attention here takes {sizes}; use a "
            "model with one of these"
        )


def load(
    model: str, dtype: Dtype, max_length: int, config: EngineConfig, trained: bool = False
) -> LLMEngine:
    """Start vLLM on a model.

    Raises:
        UserError: with vLLM's reason where it does not start; its traceback is in a file.
    """
    prepare_process()
    if on_cpu():
        check_processor()
        if is_emulated(dtype):
            _note(
                f"note: this CPU has no {dtype} arithmetic and emulates it, several times slower "
                "than float32; if memory allows use dtype float32"
            )
    import torch

    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            # Of vLLM to torch; nobody who starts an engine can do anything about them.
            warnings.simplefilter("ignore", FutureWarning)
            from vllm import LLMEngine

            return LLMEngine.from_engine_args(
                engine_arguments(model, dtype, max_length, config, trained)
            )
    except Exception as error:  # vLLM, torch and the model's own code raise what they like
        memory = "lower" if on_cpu() else "set engine.gpu_memory_utilization or"
        hint = (
            f"if memory is short {memory} engine.kv_gib, or lower engine.max_num_seqs or "
            "sampler.max_length"
        )
        raise _refusal(model, error, hint) from error
    finally:
        torch.set_num_threads(threads)


def gpu_bytes() -> int:
    """Memory of the first GPU."""
    prepare_process()
    return device_memory()


@cache
def _note(text: str) -> None:
    """Say something once in a process."""
    print(text, file=sys.stderr)


def _refusal(model: str, error: Exception, hint: str) -> UserError:
    """The error of a user, from vLLM's; its traceback goes to a temporary file."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="pav-vllm-", suffix=".log", delete=False, encoding="utf-8"
    ) as log:
        log.writelines(traceback.format_exception(error))
    return UserError(
        f"vLLM cannot serve {model!r}: {first_cause(error)}; {hint} (traceback: {log.name})"
    )


def first_cause(error: BaseException) -> str:
    """The first line that says what went wrong, of the exception that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    if len(lines) > 1 and "validation error" in said:
        # Pydantic begins with a count and the name of a class of vLLM's; the field may follow.
        said = " ".join(lines[1:]).split(" [type=")[0].replace("Value error, ", "")
    return textwrap.shorten(said.rstrip(".;: "), 300, placeholder=" ...")


def main() -> None:
    """Load vLLM's kernels for this machine and say which; what the set-up ends with."""
    try:
        check_processor()
    except UserError as error:
        sys.exit(f"error: {error}")
    prepare_process()
    import torch
    import vllm

    if not load_kernels():
        sys.exit(
            "error: vLLM's kernels do not load; what it says above is the reason. Run 'make clean' "
            "and repeat"
        )
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, vllm {vllm.__version__}, CPU with {capability}")


if __name__ == "__main__":
    main()
