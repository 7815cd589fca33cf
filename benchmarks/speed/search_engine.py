"""What beam search and scoring cost over bare generation.

``OMP_NUM_THREADS=1 python -m benchmarks.speed.search_engine``, in one process, by turns:

* **engine efficiency**: policy tokens per second of a fused beam search over those of vLLM's raw
  decode: whole solutions, as many sequences in flight as an engine takes, as many tokens. Between
  the two stands the *replay*: the search's own requests, step by step, given to vLLM all at once.
  Raw over replay is what stopping at every step costs (a request and the prefill of a part of a
  block each); replay over search is what waiting for one's own children and our code cost.
* **best-of-N** over raw decode.
* **fused scoring over none**: the same requests with and without scores.
* **separate scoring**: a search's readings with the prefix cache and without.

Seconds are the processor's, with one thread those of a clock on an idle machine; on a GPU those of
the clock.
Writes ``benchmarks/results/speed_search_engine.{json,csv,png}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.speed.results import SECOND, bars, in_process, metric, result, seconds, write
from pav.cli.run import run
from pav.core.seeds import seed_of
from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.engine.vllm import VllmEngine
from pav.policy.inference import Read, Sampled
from pav.tasks.base import Problem
from pav.verifier.checkpoint import load_verifier
from pav.verifier.score import Pick
from pav.verifier.scoring import Scorer
from search.run.opening import open_session
from search.run.records import Record
from search.run.session import Session
from search.run.solve import beam_record, beam_settings, traces_record

COMMAND = (
    "OMP_NUM_THREADS=1 python -m benchmarks.speed.search_engine --other runs/gsm8k/demo/pav.ckpt"
)
OVERHEAD = 0.08


@dataclass(frozen=True)
class EngineSpeedConfig:
    """What beam search and scoring cost over bare generation.

    Args:
        fused: a verifier that is served by the policy's engine.
        separate: one with an engine of its own.
        other: another fused verifier, e.g. runs/gsm8k/demo/pav.ckpt of ``make demo-gsm8k``.
        problems: how many.
        n: beam widths.
        other_problems: how many for ``other``.
        other_n: beam widths for ``other``.
        engine: device settings.
    """

    fused: str = "pav:reference_fused"
    separate: str = "pav:reference"
    other: str | None = None
    problems: int = 64
    n: list[int] = field(default_factory=lambda: [4, 16])
    other_problems: int = 4
    other_n: list[int] = field(default_factory=lambda: [4])
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class Recorder:
    """An engine that remembers what it was asked."""

    engine: VllmEngine
    samples: list[tuple[list[int], dict[str, Any]]] = field(default_factory=list)
    reads: list[tuple[list[int], int | None]] = field(default_factory=list)

    @property
    def score_ids(self) -> list[int]:
        return self.engine.score_ids

    @property
    def busy(self) -> int:
        return self.engine.busy

    def step(self) -> None:
        self.engine.step()

    async def sample(self, ids: Sequence[int], sampler: Any, **call: Any) -> Sampled:
        self.samples.append((list(ids), {"sampler": sampler, **call}))
        return await self.engine.sample(ids, sampler, **call)

    async def read(self, ids: Sequence[int], *, logprobs_from: int | None = None) -> Read:
        self.reads.append((list(ids), logprobs_from))
        return await self.engine.read(ids, logprobs_from=logprobs_from)

    def start(self) -> None:
        self.engine.start()

    def reset_prefix_cache(self) -> None:
        self.engine.reset_prefix_cache()


def engine_speed(config: EngineSpeedConfig) -> None:
    """Measure and write (see the module)."""
    metrics, rows = _fused(config.fused, "tape", config.problems, config.n, 0.7, config.engine)
    more, other = _separate(config)
    metrics, rows = metrics + more, rows + other
    if config.other is not None:
        more, other = _fused(
            config.other, "SmolLM2", config.other_problems, config.other_n, 0.85, config.engine
        )
        metrics, rows = metrics + more, rows + other
    write("search_engine", metrics, rows, [0], config.problems, COMMAND)
    sampled = [r for r in rows if not r["way"].startswith("readings")]
    bars(
        [(r["way"], r["tokens"] / r["seconds"]) for r in sampled],
        f"policy tokens per {SECOND} (log)",
        result("search_engine", "png"),
        log=True,
    )  # fmt: skip


def _fused(
    name: str, task: str, count: int, widths: Sequence[int], least: float, device: EngineConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    verifier = load_verifier(name)
    session = open_session(verifier, None, None, None, device)
    scorer = session.scorer(verifier, "fused", True, None)
    engine = in_process(scorer.engine)
    problems = session.problems("test", count)
    metrics, rows = [], []

    def row(way: str, tokens: int, spent: float) -> None:
        rows.append({"way": f"{way}, {task}", "tokens": tokens, "seconds": round(spent, 2)})
        print(rows[-1], flush=True)

    for n in widths:
        recorder = Recorder(engine)
        records, spent = _searched(session, scorer, recorder, problems, n)
        tokens = sum(r.policy_tokens for r in records)
        again, replayed = _replay(engine, recorder.samples, scores=True)
        bare, bare_spent = _replay(engine, recorder.samples, scores=False)
        whole, raw_spent = _raw(engine, session, problems, tokens)
        row(f"beam N={n}, fused", tokens, spent)
        row(f"replay N={n}, fused", again, replayed)
        row(f"replay N={n}, no scores", bare, bare_spent)
        row(f"raw decode N={n}", whole, raw_spent)
        raw = whole / raw_spent
        metrics += [
            metric(f"beam search over raw decode, tokens/s, {task}, N={n}",
                   tokens / spent / raw, (">=", least)),
            metric(f"its requests all at once over raw decode, tokens/s, {task}, N={n}",
                   again / replayed / raw),
            metric(f"fused scoring over none, share of seconds, requests of a beam, {task}, N={n}",
                   (replayed / again) / (bare_spent / bare) - 1, ("<=", OVERHEAD)),
        ]  # fmt: skip
    best, best_spent = _best_of(session, None, problems, 16)
    scored, scored_spent = _best_of(session, scorer, problems, 16)
    plain = in_process(session.sampling_engine(None))
    whole, raw_spent = _raw(plain, session, problems, best)
    row("best-of-16", best, best_spent)
    row("best-of-16, fused scores", scored, scored_spent)
    row("raw decode of the plain policy", whole, raw_spent)
    metrics += [
        metric(f"best-of-16 over raw decode, tokens/s, {task}",
               (best / best_spent) / (whole / raw_spent), (">=", 0.95)),
        metric(f"fused scoring over none, share of seconds, best-of-16, {task}",
               (scored_spent / scored) / (best_spent / best) - 1, ("<=", OVERHEAD)),
    ]  # fmt: skip
    session.shutdown()
    return metrics, rows


def _separate(config: EngineSpeedConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Readings of a search, with the prefix cache and without, all at once."""
    verifier = load_verifier(config.separate)
    session = open_session(verifier, None, None, None, config.engine)
    scorer = session.scorer(verifier, "separate", True, None)
    session.sampling_engine(scorer)
    problems = session.problems("test", config.problems)
    engine = in_process(scorer.engine)
    recorder = Recorder(engine)
    n = config.n[0]
    records, spent = _searched(session, scorer, recorder, problems, n)
    tokens = sum(r.policy_tokens for r in records)
    reads = recorder.reads
    cached, with_cache = _timed(
        engine,
        [partial(engine.read, ids, logprobs_from=first) for ids, first in reads],
        lambda out: out.computed + sum(gap.computed for gap in out.gaps),
    )
    whole, without = _timed(
        engine,
        [partial(_read_anew, engine, ids, first is not None) for ids, first in reads],
        lambda out: out.computed,
    )
    session.shutdown()
    label = f"tape, N={n}"
    rows = [
        {"way": f"beam N={n}, separate, tape", "tokens": tokens, "seconds": round(spent, 2)},
        {"way": f"readings with cache, {label}", "tokens": cached,
         "seconds": round(with_cache, 2)},
        {"way": f"readings without cache, {label}", "tokens": whole,
         "seconds": round(without, 2)},
    ]  # fmt: skip
    for shown in rows:
        print(shown, flush=True)
    return [
        metric(f"separate scoring without prefix cache over with, seconds, {label}",
               without / with_cache),
        metric(f"separate scoring without prefix cache over with, computed tokens, {label}",
               whole / cached),
        metric(f"separate scoring, share of the search's seconds, {label}", with_cache / spent),
    ], rows  # fmt: skip


async def _read_anew(engine: VllmEngine, ids: list[int], surprise: bool) -> Read:
    """A reading as vLLM does it by default: without the cache where log-probabilities are read."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    parameters = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        logprob_token_ids=engine.score_ids,
        prompt_logprobs=0 if surprise else None,
        skip_reading_prefix_cache=True,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    return await engine._submit(
        ids, parameters, lambda answer: Read(np.zeros(0), None, len(answer.prompt), 0)
    )


def _searched(
    session: Session, scorer: Scorer, recorder: Recorder, problems: list[Problem], n: int
) -> tuple[list[Record], float]:
    recorded = replace(scorer, engine=recorder)  # type: ignore[arg-type]
    settings = beam_settings(scorer.verifier.card, n, 3, None, None)

    async def search(problem: Problem) -> Record:
        return await beam_record(session, recorded, settings, "last", "beam", 0, problem)

    return _run(session, search, problems, f"beam N={n}")


def _best_of(
    session: Session, scorer: Scorer | None, problems: list[Problem], n: int
) -> tuple[int, float]:
    session.sampling_engine(scorer)

    async def sample(problem: Problem) -> Record:
        rule: Pick = "majority" if scorer is None else "last"
        return await traces_record(session, scorer, n, rule, "best-of-N", 0, problem)

    records, spent = _run(session, sample, problems, f"best-of-{n}")
    return sum(r.policy_tokens for r in records), spent


def _run(
    session: Session, job: Any, problems: list[Problem], what: str
) -> tuple[list[Record], float]:
    with TemporaryDirectory() as directory:
        started = seconds()
        found, _ = session.run(Path(directory) / "r.jsonl", problems, job, len(problems), what)
        return found, seconds() - started


def _replay(
    engine: VllmEngine, calls: Sequence[tuple[list[int], dict[str, Any]]], *, scores: bool
) -> tuple[int, float]:
    jobs = [partial(engine.sample, ids, **{**call, "scores": scores}) for ids, call in calls]
    return _timed(engine, jobs, lambda out: len(out.ids))


def _raw(
    engine: VllmEngine, session: Session, problems: Sequence[Problem], tokens: int
) -> tuple[int, float]:
    """Whole solutions, about ``tokens`` in all."""
    policy, sampler = session.policy, session.sampler
    prompts = [policy.encode(p) for p in problems]

    def jobs(count: int) -> list[Callable[[], Any]]:
        return [
            partial(
                engine.sample,
                prompts[i % len(prompts)],
                sampler,
                stop_ids=sorted(policy.stepper.eos_ids),
                max_tokens=sampler.max_length - len(prompts[i % len(prompts)]),
                seed=seed_of("raw", i),
            )
            for i in range(count)
        ]

    few = 2 * len(prompts)
    made, _ = _timed(engine, jobs(few), lambda out: len(out.ids))
    return _timed(engine, jobs(math.ceil(tokens / made * few)), lambda out: len(out.ids))


def _timed(
    engine: VllmEngine, jobs: Sequence[Callable[[], Any]], size: Callable[[Any], int]
) -> tuple[int, float]:
    """Sum of ``size`` over the results of ``jobs``, all given at once, and seconds."""
    total = 0

    def keep(out: Any) -> None:
        nonlocal total
        total += size(out)

    engine.start()
    engine.reset_prefix_cache()
    started = seconds()
    drive([engine], jobs, keep, len(jobs))
    return total, seconds() - started


if __name__ == "__main__":
    run(engine_speed, EngineSpeedConfig, "benchmarks.speed.search_engine")
