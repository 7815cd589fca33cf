"""The one adapter to vLLM: token ids in, token ids and scores out, no barriers.

Search and rollout code is an async function of *one* problem that awaits :meth:`Engine.sample` and
:meth:`Engine.read`; :func:`drive` turns vLLM's ``step()`` loop and resolves what each step
finished, so continuous batching mixes all problems, beams and stages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np

from pav.core.steps import Ending
from pav.engine.answers import (
    Answer,
    answer_of,
    heads_after,
    last_logprob,
    plain,
    reading,
    with_logprobs,
    with_scores,
)
from pav.engine.loading import EngineConfig, load, on_cpu
from pav.engine.read_check import check_reads
from pav.engine.vllm_internals import (
    replace_weights,
    shutdown,
    stamp_weights,
    tokens_in_flight,
)
from pav.engine.weights import check_weights, served_shapes
from pav.policy.inference import Read, Sampled, Usage
from pav.policy.policy import Dtype, Sampler

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
SCORE_BIAS = -100.0
TORN = "an update of this engine's weights broke in its middle; start another one"
ASLEEP = "this engine is asleep and has no weights; load_weights wakes it"

# The future, what makes its result, and the rule by which a sample may stop before its end.
_Waiting = tuple[asyncio.Future[Any], Callable[[Answer], Any], Ending | None]


@dataclass
class VllmEngine:
    """A vLLM engine in this process; it loads its model when it is started, or first asked.

    Args:
        model: directory (or hub id) to serve.
        dtype: never chosen by vLLM.
        max_length: longest sequence.
        score_ids: ids of the head rows followed by the reference row, or empty for a plain model.
        config: device settings.
        trained: it gets other weights while it runs (:meth:`load_weights`), and log-probabilities
            of samples are of the distribution that was sampled from, whatever the sampler. Not
            with score rows.

    Attributes:
        version: of its weights; 0 for those of the directory.
    """

    model: str
    dtype: Dtype
    max_length: int
    score_ids: list[int] = field(default_factory=list)
    config: EngineConfig = field(default_factory=EngineConfig)
    trained: bool = False
    usage: Usage = field(default_factory=Usage)
    version: int = field(default=0, init=False)
    _engine: Any = field(default=None, init=False, repr=False)
    # TORN or ASLEEP, or empty.
    _unusable: str = field(default="", init=False, repr=False)
    _futures: dict[str, _Waiting] = field(default_factory=dict, init=False, repr=False)
    _next: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.trained and self.score_ids:
            raise ValueError(
                "a verifier's heads are rows of this engine's output matrix and belong to its "
                "weights: a policy that is trained is scored by a verifier of its own weights"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # What crosses to a worker is what an engine is made with; it is one there, however often it
        # arrives.
        ids = tuple(self.score_ids)
        made_with = (self.model, self.dtype, self.max_length, ids, self.config, self.trained)
        return _shared, made_with

    def start(self) -> None:
        """Load the model, unless that is done.

        Raises:
            UserError: if vLLM cannot load it, or does not answer as we read it.
        """
        if self._engine is not None:
            return
        self._engine = load(self.model, self.dtype, self.max_length, self.config, self.trained)
        stamp_weights(self._engine, self.version)
        if self.score_ids and not on_cpu():
            # Which of vLLM's two model runners answers, and how, depends on device and version.
            check_reads(self)

    @property
    def busy(self) -> int:
        """Requests that wait for a step."""
        return len(self._futures)

    @property
    def in_flight(self) -> int:
        """Tokens that the requests in work have so far; for a progress line alone."""
        return tokens_in_flight(self._engine)

    async def sample(
        self,
        ids: Sequence[int],
        sampler: Sampler,
        *,
        stop_ids: Sequence[int],
        max_tokens: int,
        seed: int,
        scores: bool = False,
        logprobs: bool = False,
        until: Ending | None = None,
    ) -> Sampled:
        """Sample up to ``max_tokens`` after ``ids``; score ids are never sampled.

        With ``logprobs`` the log-probability of each token comes along. The sample also stops
        where ``until`` says so: with a :class:`~pav.core.steps.Stepper`, ``ids`` end with a step,
        and a step that is final by its rule ends the sample.

        Raises:
            ValueError: if log-probabilities are asked for that this engine does not have.
        """
        if logprobs and not self.trained and not _is_plain(sampler):
            raise ValueError(
                f"log-probabilities of {sampler} are asked of an engine that has those of "
                "temperature 1 alone; make it with trained=True"
            )
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
            # The sampled token's alone.
            logprobs=0 if logprobs and not scores else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        if until is not None and not until.is_watching:
            until = None
        if until is not None:
            parameters.output_kind = RequestOutputKind.CUMULATIVE
        convert = with_scores if scores else with_logprobs if logprobs else plain
        return await self._submit(ids, parameters, convert, until)

    async def read(self, ids: Sequence[int], *, logprobs_from: int | None = None) -> Read:
        """Heads at the last position of ``ids``, and the log-probability of the tokens from index
        ``logprobs_from`` (1 or more) on.

        The prefix cache serves what it can. It keeps no logits, so the log-probability of the token
        after a cached block, and of those in it, may be missing: a second reading that ends there
        computes the last cached block anew.
        """
        read = await self._read(ids, self.score_ids, logprobs_from is not None, heads_after)
        if read.logprobs is None or logprobs_from is None:
            return read

        def wanted(part: Read) -> np.ndarray:
            # A reading knows the tokens from the second computed one on.
            assert part.logprobs is not None
            return part.logprobs[max(logprobs_from - 1 - part.cached, 0) :]

        known = [wanted(read)]
        gaps: list[Read] = []
        end = read.cached
        while end >= logprobs_from:
            gap = await self._read(ids[:end], [ids[end]], True, last_logprob)
            gaps.append(gap)
            known += [gap.heads, wanted(gap)]
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

        With ``logprobs`` also of every computed token but the first of them.
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
            lambda answer: reading(answer, heads_of(answer.logprobs)),
        )

    def _submit(
        self,
        ids: Sequence[int],
        parameters: Any,
        convert: Callable[[Answer], T],
        until: Ending | None = None,
    ) -> asyncio.Future[T]:
        self.start()
        if self._unusable:
            raise RuntimeError(self._unusable)
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
            future, convert, until = self._futures[output.request_id]
            answer = answer_of(output, self.version)
            if until is not None and until.is_solution(answer.ids):
                if not output.finished:
                    self._engine.abort_request([output.request_id])
                answer = replace(answer, stopped=True)
            elif not output.finished:
                continue
            del self._futures[output.request_id]
            self.usage.generated += len(answer.ids)
            self.usage.cached += answer.cached
            self.usage.prefilled += answer.prefilled
            if not future.done():
                future.set_result(convert(answer))

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Serve other weights of the same model from now on: in place, without a start.

        Prefixes that the old weights cached are forgotten. vLLM copies, so ``state`` may change
        afterwards. An engine that sleeps wakes: its KV cache comes last, when a copy of the weights
        on the same device may be gone.

        Args:
            state: a transformers ``state_dict()``, the tied output matrix included.
            version: what samples are marked with; not below the last one.

        Raises:
            UserError: naming a tensor that is missing, unknown or of another shape; the engine goes
                on as it was.
            RuntimeError: if requests are in work, or an earlier update broke in its middle.
        """
        self._check_idle()
        if version < self.version:
            raise RuntimeError(f"weights of version {version} come after those of {self.version}")
        check_weights(self.model, served_shapes(self.model), state)
        # First: vLLM may refuse it. Nothing is cached between here and the new weights.
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM holds prefixes of requests; weights change between requests")
        asleep, self._unusable = bool(self._unusable), TORN
        if asleep:
            self._engine.wake_up(tags=["weights"])
        replace_weights(self._engine, state)
        if asleep:
            self._engine.wake_up(tags=["kv_cache"])
        stamp_weights(self._engine, version)
        self.version, self._unusable = version, ""

    def sleep(self) -> None:
        """Give the memory of weights and KV cache back, until :meth:`load_weights`.

        For a trainer on the same GPU. On a CPU vLLM keeps its memory.

        Raises:
            RuntimeError: if requests are in work.
        """
        self._check_idle()
        if not self._unusable:
            self._engine.sleep(level=2)
            self._unusable = ASLEEP

    def _check_idle(self) -> None:
        if not self.trained:
            raise RuntimeError("this engine keeps its weights; make it with trained=True")
        if self.busy:
            raise RuntimeError(f"{self.busy} requests are in work; weights change between requests")
        if self._unusable == TORN:
            raise RuntimeError(TORN)
        self.start()

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes, so that what a method costs does not depend on the one before."""
        if self._engine is not None:
            self._engine.reset_prefix_cache()

    def shutdown(self) -> None:
        """Free the device. vLLM's state is the process's: its other engines end with this one."""
        shutdown(self._engine)


@cache
def _shared(
    model: str,
    dtype: Dtype,
    max_length: int,
    score_ids: tuple[int, ...],
    config: EngineConfig,
    trained: bool,
) -> VllmEngine:
    return VllmEngine(model, dtype, max_length, list(score_ids), config, trained)


def _is_plain(sampler: Sampler) -> bool:
    """Whether a sampler draws from the model's own distribution."""
    return sampler == Sampler(max_length=sampler.max_length)
