"""``search.best_of_n``: independent solutions, ranked by a verifier at their last position."""

from __future__ import annotations

from pav.core.seeds import seed_of
from pav.verifier.pick import Candidate
from pav.verifier.score import Values
from pav.verifier.scoring import NO_LOGPROBS, StepScorer
from search.methods.context import SearchContext
from search.methods.expand import gather_or_cancel


async def sample_traces(
    context: SearchContext,
    n: int,
    scorer: StepScorer | None,
    every_step: bool = False,
) -> list[Candidate]:
    """``n`` graded-to-be solutions of one problem.

    Trace i depends on (seed, problem, i) alone: the first m of n are what a run with n=m samples.

    Args:
        context: problem, policy and engine.
        n: how many.
        scorer: verifier that values them; None for none.
        every_step: value all steps and not only the last (for the minimum over steps).
    """
    problem, policy, sampler = context.problem, context.policy, context.sampler
    prompt = policy.encode(problem)
    room = sampler.max_length - len(prompt)
    if room <= 0:
        return [Candidate([], [], {}, 0.0, finished=False, truncated=True) for _ in range(n)]

    async def one(index: int) -> Candidate:
        fused = scorer is not None and scorer.fused
        out = await context.engine.sample(
            prompt,
            sampler,
            stop_ids=sorted(policy.stepper.eos_ids),
            max_tokens=room,
            seed=seed_of(context.seed, problem.id, "trace", index),
            scores=fused,
            until=policy.stepper,
        )
        context.cost.sampled(out)
        ends = policy.stepper.step_ends(out.ids)
        finished = out.stopped and bool(ends) and ends[-1] == len(out.ids)
        q: dict[str, list[float]] = {}
        if scorer is not None and finished:
            rows: list[Values] = []
            logprobs = NO_LOGPROBS
            for j in range(0 if every_step else len(ends), len(ends) + 1):
                end, upto = (ends[j - 1] if j else 0), ends[:j]
                if fused and out.heads is not None and out.logprobs is not None:
                    at = out.heads[max(end - 1, 0)]
                    rows.append(scorer.values(at, out.logprobs, out.ids[:end], upto))
                else:
                    read = await scorer.read(problem, out.ids[:end], upto, context.cost, logprobs)
                    rows.append(read.values)
                    logprobs = read.logprobs
            q = {h: [r[h] for r in rows] for h in rows[0]}
        return Candidate(
            ids=out.ids,
            ends=ends,
            q=q,
            score=0.0,
            finished=finished,
            truncated=not finished,
            tokens=len(out.ids),
        )

    return await gather_or_cancel(one(i) for i in range(n))
