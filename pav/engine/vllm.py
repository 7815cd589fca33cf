"""The one adapter to vLLM: token ids in, token ids and scores out, no barriers.

Search and rollout code is an async function of *one* problem that awaits :meth:`Engine.sample` and
:meth:`Engine.read`; :func:`drive` turns vLLM's ``step()`` loop and resolves what each step
finished, so continuous batching mixes all problems, beams and stages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np

from pav.core.errors import UserError
from pav.core.steps import Stepper
from pav.engine.loading import EngineConfig, load, on_cpu
from pav.engine.read_check import check_reads
from pav.engine.vllm_internals import shutdown, tokens_in_flight
from pav.policy.inference import SCORE_SCALE, Read, Sampled, Usage
from pav.policy.policy import Dtype, Sampler

T = TypeVar("T")
SCORE_BIAS = -100.0


@dataclass(frozen=True)
class _Answer:
    """What vLLM has of a request.

    Attributes:
        prompt: its ids.
        cached: how many of them came from the prefix cache.
        ids: sampled ones.
        stopped: whether a stop token or a final step ended them, not the length.
        logprobs: flat ones of every sampled token.
        prompt_logprobs: flat ones of the prompt's, if they were asked for.
    """

    prompt: Sequence[int]
    cached: int
    ids: Sequence[int]
    stopped: bool
    logprobs: Any
    prompt_logprobs: Any

    @property
    def prefilled(self) -> int:
        """Tokens of the prompt that were computed."""
        return len(self.prompt) - self.cached


# The future, what makes its result, and the rule by which a sample may stop before its end.
_Waiting = tuple[asyncio.Future[Any], Callable[[_Answer], Any], Stepper | None]


@dataclass
class VllmEngine:
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
    _futures: dict[str, _Waiting] = field(default_factory=dict, init=False, repr=False)
    _next: int = field(default=0, init=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # What crosses to a worker is what an engine is made with; it is one there, however often it
        # arrives.
        ids = tuple(self.score_ids)
        return _shared, (self.model, self.dtype, self.max_length, ids, self.config)

    def start(self) -> None:
        """Load the model, unless that is done.

        Raises:
            UserError: if vLLM cannot load it, or does not answer as we read it.
        """
        if self._engine is not None:
            return
        self._engine = load(self.model, self.dtype, self.max_length, self.config)
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
        return await self._submit(ids, parameters, _scored if scores else _plain, until)

    async def read(self, ids: Sequence[int], *, logprobs_from: int | None = None) -> Read:
        """Heads at the last position of ``ids``, and the log-probability of the tokens from index
        ``logprobs_from`` (1 or more) on.

        The prefix cache serves what it can. It keeps no logits, so the log-probability of the token
        after a cached block, and of those in it, may be missing: a second reading that ends there
        computes the last cached block anew.
        """
        read = await self._read(ids, self.score_ids, logprobs_from is not None, _heads)
        if read.logprobs is None or logprobs_from is None:
            return read

        def asked(part: Read) -> np.ndarray:
            # A reading knows the tokens from the second computed one on.
            assert part.logprobs is not None
            return part.logprobs[max(logprobs_from - 1 - part.cached, 0) :]

        known = [asked(read)]
        gaps: list[Read] = []
        end = read.cached
        while end >= logprobs_from:
            gap = await self._read(ids[:end], [ids[end]], True, _last)
            gaps.append(gap)
            known += [gap.heads, asked(gap)]
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
            lambda answer: _reading(answer, heads_of(answer.logprobs)),
        )

    def _submit(
        self,
        ids: Sequence[int],
        parameters: Any,
        convert: Callable[[_Answer], T],
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
            future, convert, until = self._futures[output.request_id]
            answer = _answer(output)
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

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes, so that what a method costs does not depend on the one before."""
        if self._engine is not None:
            self._engine.reset_prefix_cache()

    def shutdown(self) -> None:
        """Free the device. vLLM's state is the process's: its other engines end with this one."""
        shutdown(self._engine)


@cache
def _shared(
    model: str, dtype: Dtype, max_length: int, score_ids: tuple[int, ...], config: EngineConfig
) -> VllmEngine:
    return VllmEngine(model, dtype, max_length, list(score_ids), config)


def _answer(output: Any) -> _Answer:
    completion = output.outputs[0]
    return _Answer(
        output.prompt_token_ids,
        output.num_cached_tokens or 0,
        completion.token_ids,
        completion.finish_reason == "stop",
        completion.logprobs,
        output.prompt_logprobs,
    )


def _plain(answer: _Answer) -> Sampled:
    return Sampled(
        list(answer.ids), answer.stopped, prefilled=answer.prefilled, cached=answer.cached
    )


def _scored(answer: _Answer) -> Sampled:
    logprobs, heads = _split(answer.logprobs)
    return replace(_plain(answer), logprobs=logprobs, heads=heads)


def _heads(flat: Any) -> np.ndarray:
    """Head logits after the last token."""
    return _split(flat)[1][0]


def _last(flat: Any) -> np.ndarray:
    """Log-probability of the one token that was asked for."""
    return np.asarray(flat.logprobs, np.float32)[-1:]


def _reading(answer: _Answer, heads: np.ndarray) -> Read:
    logprobs = None if answer.prompt_logprobs is None else _computed(answer)
    return Read(heads, logprobs, answer.prefilled, answer.cached)


def _computed(answer: _Answer) -> np.ndarray:
    """Log-probability of every token whose predecessor was computed: those from ``cached + 1`` on.

    vLLM has two model runners. The first one (CPUs) answers with a row for every token but the
    first, of which those of cached tokens are garbage; the second one (GPUs) with rows of computed
    tokens alone. Both name each row's token.

    Raises:
        UserError: if the answer has another form, or is about other tokens.
    """
    ids, rows, cached = answer.prompt, answer.prompt_logprobs, answer.cached
    known = len(ids) - cached - 1
    start = len(rows.logprobs) - known
    if len(rows.logprobs) not in (len(ids) - 1, known) or rows.token_ids[start:] != list(
        ids[cached + 1 :]
    ):
        raise UserError(
            f"vLLM answers with {len(rows.logprobs)} log-probabilities, the last of tokens "
            f"{rows.token_ids[-3:]}, to a text of {len(ids)} tokens of which {cached} were cached "
            f"and the last are {list(ids[-3:])}: scores would be wrong. Set "
            "VLLM_USE_V2_MODEL_RUNNER=0 in the environment; if KV cache was short, lower "
            "engine.max_num_seqs or raise engine.kv_gib"
        )
    return np.asarray(rows.logprobs[start:], np.float32)


def _split(flat: Any) -> tuple[np.ndarray, np.ndarray]:
    """Columns of an answer (sampled token, heads ..., reference row) -> log-probs and head logits.

    The reference row is all zero: its log-probability is minus the normaliser, so a head's logit is
    the difference to it.
    """
    rows = np.asarray(flat.logprobs, dtype=np.float32).reshape(len(flat), -1)
    return rows[:, 0], (rows[:, 1:-1] - rows[:, -1:]) * np.float32(SCORE_SCALE)
