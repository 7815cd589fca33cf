"""Sampling one step from the policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pav.core.seeds import seed_of
from pav.core.steps import MAX_BLANK_RESUMES
from search.methods.context import SearchContext


@dataclass(frozen=True)
class SampledStep:
    """A sampled step.

    Attributes:
        ids: its tokens.
        finished: it ends the solution.
        truncated: the length cap (or a cut step that is not scored) ended it.
        logprobs: (tokens,) in the served softmax; None without fused scores.
        first_heads, last_heads: (H,) head logits before the first and the last token.
    """

    ids: list[int]
    finished: bool
    truncated: bool
    logprobs: np.ndarray | None = None
    first_heads: np.ndarray | None = None
    last_heads: np.ndarray | None = None


async def sample_step(
    context: SearchContext, before: list[int], key: tuple[object, ...], fused: bool
) -> SampledStep:
    """Sample until a step ends.

    Delimiters that end no step (blank lines, steps under ``min_tokens``) are sampled through; after
    :data:`~pav.core.steps.MAX_BLANK_RESUMES` blank ones the candidate counts as truncated.

    Args:
        context: policy and engine; its cost is charged with every sampled token.
        before: prompt and prefix ids.
        key: what the request's seed derives from.
        fused: whether to ask for scores.
    """
    stepper, sampler = context.policy.stepper, context.sampler
    rule = stepper.rule
    step: list[int] = []
    logprobs: list[np.ndarray] = []
    first = last = None
    truncated = False
    resumes = 0
    while True:
        room = sampler.max_length - len(before) - len(step)
        if room <= 0 or resumes > MAX_BLANK_RESUMES + rule.min_tokens:
            truncated = True
            break
        limit = room if rule.max_tokens is None else min(room, rule.max_tokens - len(step))
        out = await context.engine.sample(
            before + step,
            sampler,
            stop_ids=stepper.stop_ids,
            max_tokens=limit,
            seed=seed_of(*key, resumes),
            scores=fused,
        )
        context.cost.sampled(out)
        step += out.ids
        if out.heads is not None and out.logprobs is not None:
            logprobs.append(out.logprobs)
            first = out.heads[0] if first is None else first
            last = out.heads[-1]
        if stepper.ends_step(step):
            truncated = stepper.is_cut(step) and not rule.score_cut
            break
        resumes += 1
    finished = not truncated and stepper.is_final(step)
    return SampledStep(
        step, finished, truncated, np.concatenate(logprobs) if logprobs else None, first, last
    )
