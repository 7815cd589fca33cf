"""What vLLM answers to a request, and what is made of it: token ids, log-probabilities, heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pav.core.errors import UserError
from pav.engine.vllm_internals import weight_versions
from pav.policy.inference import SCORE_SCALE, Read, Sampled


@dataclass(frozen=True)
class Answer:
    """What vLLM has of a request.

    Attributes:
        prompt: its ids.
        cached: how many of them came from the prefix cache.
        ids: sampled ones.
        stopped: whether a stop token or a final step ended them, not the length.
        logprobs: flat ones of every sampled token.
        prompt_logprobs: flat ones of the prompt's, if they were asked for.
        version: of the weights that sampled it.
    """

    prompt: Sequence[int]
    cached: int
    ids: Sequence[int]
    stopped: bool
    logprobs: Any
    prompt_logprobs: Any
    version: int

    @property
    def prefilled(self) -> int:
        """Tokens of the prompt that were computed."""
        return len(self.prompt) - self.cached


def answer_of(output: Any, version: int) -> Answer:
    """What vLLM's output says of a request.

    Args:
        output: of a step.
        version: of the engine's weights.

    Raises:
        RuntimeError: if other weights sampled a part of it.
    """
    completion = output.outputs[0]
    if not weight_versions(completion) <= {version}:
        raise RuntimeError(
            f"a sample was made by weights of versions {sorted(weight_versions(completion))}, and "
            f"those of this engine are {version}: its log-probabilities would be of no policy"
        )
    return Answer(
        output.prompt_token_ids,
        output.num_cached_tokens or 0,
        completion.token_ids,
        completion.finish_reason == "stop",
        completion.logprobs,
        output.prompt_logprobs,
        version,
    )


def plain(answer: Answer) -> Sampled:
    """The tokens alone."""
    return Sampled(
        list(answer.ids),
        answer.stopped,
        prefilled=answer.prefilled,
        cached=answer.cached,
        version=answer.version,
    )


def with_logprobs(answer: Answer) -> Sampled:
    """Tokens and their log-probabilities."""
    return replace(plain(answer), logprobs=_split(answer.logprobs)[0])


def with_scores(answer: Answer) -> Sampled:
    """Tokens, their log-probabilities and the heads before each."""
    logprobs, heads = _split(answer.logprobs)
    return replace(plain(answer), logprobs=logprobs, heads=heads)


def heads_after(flat: Any) -> np.ndarray:
    """Head logits after the last token."""
    return _split(flat)[1][0]


def last_logprob(flat: Any) -> np.ndarray:
    """Log-probability of the one token that was asked for."""
    return np.asarray(flat.logprobs, np.float32)[-1:]


def reading(answer: Answer, heads: np.ndarray) -> Read:
    """What is said of a text, given the heads after it."""
    logprobs = None if answer.prompt_logprobs is None else _computed(answer)
    return Read(heads, logprobs, answer.prefilled, answer.cached)


def _computed(answer: Answer) -> np.ndarray:
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
