"""The one adapter to vLLM: token ids in, token ids and scores out, no barriers.

Search and rollout code is an async function of *one* problem that awaits :meth:`Engine.sample` and
:meth:`Engine.read`; :func:`drive` turns vLLM's ``step()`` loop and resolves what each step
finished, so continuous batching mixes all problems, beams and stages.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar, cast

# Set before vLLM is imported: one process, so that a repeat of a run is bit-identical.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np

from pav.errors import UserError
from pav.policy import Dtype, Sampler
from pav.steps import Stepper

T = TypeVar("T")
SCORE_BIAS = -100.0
# Head rows are served divided by this (a power of two, hence exact) so that they weigh next to
# nothing in the softmax's normaliser and log-probabilities stay those of the model itself.
SCORE_SCALE = 8.0


@cache
def _on_cpu() -> bool:
    """Whether engines compute on the CPU; says so to torch and vLLM, which is imported later."""
    # Not at the top: who only asks for --help need not wait for torch.
    import torch

    if torch.cuda.is_available():
        return False
    # The only compiled function left on the CPU path counts ranks, which we do not read; eager
    # spares the user a C++ compiler and half a minute.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    # The variable is for vLLM: torch has read it when it was imported.
    torch._dynamo.config.disable = os.environ["TORCH_COMPILE_DISABLE"] == "1"
    # vLLM would bind its threads to cores of its own choice; the user's OMP_NUM_THREADS rules.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return True


@dataclass(frozen=True)
class EngineConfig:
    """How an engine uses its device.

    Args:
        kv_gib: KV cache in GiB (CPU, or several engines on one GPU); None lets vLLM fill the GPU's
            ``gpu_memory_utilization``.
        gpu_memory_utilization: share of a GPU that vLLM may take where ``kv_gib`` is None.
        tensor_parallel_size: GPUs of one engine.
        max_num_seqs: sequences per step.
        block_size: tokens per KV block; prefixes are cached in whole blocks.
        enforce_eager: no CUDA graphs.
    """

    kv_gib: float | None = None
    gpu_memory_utilization: float = 0.85
    tensor_parallel_size: int = 1
    max_num_seqs: int = 256
    block_size: int | None = None
    enforce_eager: bool = False


@dataclass(frozen=True)
class Sampled:
    """A sampled continuation.

    Attributes:
        ids: the tokens, the stop token included.
        stopped: whether a stop token ended it (else the length cap did).
        logprobs: (tokens,) log-probability of each token in the served softmax (score rows
            included); only where scores were asked for.
        heads: (tokens, heads) logit of every head at the position that predicts each token.
        prefilled: tokens of the given prefix that were computed.
        cached: tokens of it taken from the prefix cache.
    """

    ids: list[int]
    stopped: bool
    logprobs: np.ndarray | None = None
    heads: np.ndarray | None = None
    prefilled: int = 0
    cached: int = 0


@dataclass(frozen=True)
class Read:
    """What a model says of a given sequence.

    Attributes:
        heads: (heads,) logits at the last position.
        logprobs: log-probability of every token that was asked for; None if none was.
        computed: tokens computed.
        cached: tokens taken from the prefix cache.
        gaps: further readings, of what the prefix cache does not remember.
    """

    heads: np.ndarray
    logprobs: np.ndarray | None
    computed: int
    cached: int
    gaps: tuple[Read, ...] = ()


@dataclass
class Usage:
    """Tokens an engine has worked through."""

    generated: int = 0
    prefilled: int = 0
    cached: int = 0


def seed_of(*key: object) -> int:
    """Seed of a request: a hash of its key (run seed, problem, prefix, index), 63 bits."""
    text = "\x1f".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass
class Engine:
    """A vLLM engine in this process; it loads its model when it is started, or first asked.

    Args:
        model: directory (or hub id) to serve.
        dtype: never chosen by vLLM.
        max_length: longest sequence.
        score_ids: ids of the head rows followed by the reference row, or empty for a plain model.
        config: device settings.
    """

    model: str
    dtype: Dtype
    max_length: int
    score_ids: list[int] = field(default_factory=list)
    config: EngineConfig = field(default_factory=EngineConfig)
    usage: Usage = field(default_factory=Usage)
    _engine: Any = field(default=None, init=False, repr=False)
    _futures: dict[str, tuple[asyncio.Future[Any], Callable[[Any], Any], Stepper | None]] = field(
        default_factory=dict, init=False, repr=False
    )
    _next: int = field(default=0, init=False, repr=False)

    def start(self) -> None:
        """Load the model, unless that is done.

        Raises:
            UserError: if vLLM cannot load it.
        """
        if self._engine is not None:
            return
        on_cpu = _on_cpu()
        import torch
        from vllm import EngineArgs, LLMEngine

        kv_gib = self.config.kv_gib or (1.0 if on_cpu else None)
        arguments: dict[str, Any] = {}
        if kv_gib is not None:
            arguments["kv_cache_memory_bytes"] = int(kv_gib * (1 << 30))
            # vLLM checks this share against free memory even where the KV size is given, which
            # would refuse a second engine on a device.
            arguments["gpu_memory_utilization"] = 0.05
        else:
            arguments["gpu_memory_utilization"] = self.config.gpu_memory_utilization
        if self.config.block_size or on_cpu:
            arguments["block_size"] = self.config.block_size or 32
        if on_cpu:
            # A prefill cut in two rewinds the request's generator, which CPU generators cannot.
            arguments["enable_chunked_prefill"] = False
        torch_threads = torch.get_num_threads()
        try:
            self._engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=self.model,
                    dtype=self.dtype,
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    max_model_len=self.max_length,
                    max_num_seqs=self.config.max_num_seqs,
                    max_num_batched_tokens=max(4096, self.max_length),
                    enable_prefix_caching=True,
                    logprobs_mode="raw_logprobs",
                    tensor_parallel_size=self.config.tensor_parallel_size,
                    enforce_eager=self.config.enforce_eager or on_cpu,
                    seed=0,
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    **arguments,
                )
            )
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"vLLM cannot load {self.model!r}: {reason}; lower engine.kv_gib, "
                "engine.max_num_seqs or sampler.max_length if memory is short"
            ) from error
        torch.set_num_threads(torch_threads)

    @property
    def busy(self) -> int:
        """Requests that wait for a step."""
        return len(self._futures)

    async def sample(
        self,
        ids: Sequence[int],
        sampler: Sampler,
        *,
        stop_ids: Sequence[int],
        max_tokens: int,
        seed: int,
        scores: bool = False,
        until: Stepper | None = None,
    ) -> Sampled:
        """Sample up to ``max_tokens`` after ``ids``; score ids are never sampled.

        With ``until``, ``ids`` end with a step, and the sample also stops after a step that is
        final by its rule (:attr:`StepRule.final`).
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=sampler.temperature,
            top_p=sampler.top_p,
            top_k=sampler.top_k,
            repetition_penalty=sampler.repetition_penalty,
            seed=seed,
            max_tokens=max_tokens,
            stop_token_ids=list(stop_ids),
            logit_bias={i: SCORE_BIAS for i in self.score_ids} or None,
            logprob_token_ids=self.score_ids if scores else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        if until is not None and not until.rule.final:
            until = None
        if until is not None:
            parameters.output_kind = RequestOutputKind.CUMULATIVE
        return await self._submit(ids, parameters, self._sampled if scores else _plain, until)

    async def read(self, ids: Sequence[int], *, logprobs_from: int | None = None) -> Read:
        """Heads at the last position of ``ids``, and the log-probability of the tokens from index
        ``logprobs_from`` (1 or more) on.

        The prefix cache serves what it can. It keeps no logits, so the log-probability of the token
        after a cached block, and of those in it, may be missing: a second reading that ends there
        computes the last cached block anew.
        """
        first = len(ids) if logprobs_from is None else logprobs_from
        read = await self._read(ids, self.score_ids, logprobs_from is not None, _heads)
        if read.logprobs is None:
            return read
        known = [read.logprobs[max(first - 1, read.cached) :]]
        gaps: list[Read] = []
        end = read.cached
        while end >= first:
            gap = await self._read(ids[:end], [ids[end]], True, _last)
            gaps.append(gap)
            known += [gap.heads, cast(np.ndarray, gap.logprobs)[max(first - 1, gap.cached) :]]
            end = gap.cached
        return replace(read, logprobs=np.concatenate(known[::-1]), gaps=tuple(gaps))

    def _read(
        self,
        ids: Sequence[int],
        token_ids: list[int],
        logprobs: bool,
        heads_of: Callable[[Any], np.ndarray],
    ) -> asyncio.Future[Read]:
        """One request that asks what is said of ``token_ids`` after ``ids``.

        With ``logprobs`` also of every token but the first; those of cached ones are garbage.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            logprob_token_ids=token_ids,
            prompt_logprobs=0 if logprobs else None,
            skip_reading_prefix_cache=False,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        return self._submit(
            ids,
            parameters,
            lambda output: _reading(output, heads_of(output.outputs[0].logprobs)),
        )

    def _submit(
        self,
        ids: Sequence[int],
        parameters: Any,
        convert: Callable[[Any], T],
        until: Stepper | None = None,
    ) -> asyncio.Future[T]:
        self.start()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        key = str(self._next)
        self._next += 1
        self._engine.add_request(key, {"prompt_token_ids": list(ids)}, parameters)
        self._futures[key] = (future, convert, until)
        future.add_done_callback(lambda done: self._abort(key) if done.cancelled() else None)
        return future

    def _abort(self, key: str) -> None:
        """Take a request that nobody waits for out of the batch."""
        if self._futures.pop(key, None) is not None:
            self._engine.abort_request([key])

    def step(self) -> None:
        """One vLLM step; resolves what it finished."""
        for output in self._engine.step():
            completion = output.outputs[0]
            future, convert, until = self._futures[output.request_id]
            if until is not None and until.is_solution(completion.token_ids):
                if not output.finished:
                    self._engine.abort_request([output.request_id])
                completion.finish_reason = "stop"
            elif not output.finished:
                continue
            del self._futures[output.request_id]
            cached = output.num_cached_tokens or 0
            self.usage.generated += len(completion.token_ids)
            self.usage.cached += cached
            self.usage.prefilled += len(output.prompt_token_ids) - cached
            if not future.done():
                future.set_result(convert(output))

    def _sampled(self, output: Any) -> Sampled:
        completion = output.outputs[0]
        logprobs, heads = _split(completion.logprobs)
        return replace(_plain(output), logprobs=logprobs, heads=heads)

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes, so that what a method costs does not depend on the one before."""
        if self._engine is not None:
            self._engine.reset_prefix_cache()

    def shutdown(self) -> None:
        """Free the device. vLLM's state is the process's: its other engines end with this one."""
        core = getattr(self._engine, "engine_core", None)  # None where it was never started
        if core is not None:
            core.shutdown()


def _plain(output: Any) -> Sampled:
    completion = output.outputs[0]
    cached = output.num_cached_tokens or 0
    return Sampled(
        list(completion.token_ids),
        completion.finish_reason == "stop",
        prefilled=len(output.prompt_token_ids) - cached,
        cached=cached,
    )


def _heads(flat: Any) -> np.ndarray:
    """Head logits after the last token."""
    return _split(flat)[1][0]


def _last(flat: Any) -> np.ndarray:
    """Log-probability of the one token that was asked for."""
    return np.asarray(flat.logprobs, np.float32)[-1:]


def _reading(output: Any, heads: np.ndarray) -> Read:
    prompt = output.prompt_logprobs
    cached = output.num_cached_tokens or 0
    return Read(
        heads,
        # Of the first token nothing is said.
        None if prompt is None else np.asarray(prompt.logprobs, np.float32),
        len(output.prompt_token_ids) - cached,
        cached,
    )


def _split(flat: Any) -> tuple[np.ndarray, np.ndarray]:
    """Columns of an answer (sampled token, heads ..., reference row) -> log-probs and head logits.

    The reference row is all zero: its log-probability is minus the normaliser, so a head's logit is
    the difference to it.
    """
    rows = np.asarray(flat.logprobs, dtype=np.float32).reshape(len(flat), -1)
    return rows[:, 0], (rows[:, 1:-1] - rows[:, -1:]) * np.float32(SCORE_SCALE)
