"""Beam search against the loops of others.

``OMP_NUM_THREADS=1 python -m benchmarks.speed.search_loops``

The algorithm, problems, N, C, score and seeds are ours throughout; only the loop differs, and every
way is measured by turns in one process on one engine:

``ours``
    every problem goes on when its own children are done; policy and verifier in vLLM.
``sequential``
    the loop of the best-known peer: one problem at a time, one batched generate call per step, then
    one batched forward pass of the verifier, in transformers, over the full texts.
``barrier``
    all problems at once, but a step of the search ends when its slowest child does: one generate
    and one scoring call for all problems and beams. On tapes of 2 to 16 operations.

Beside each ratio stands what generation alone allows: the tokens per second that vLLM makes of
whole solutions with as many sequences in flight as either loop has. Seconds are the processor's,
with one thread those of a clock on an idle machine; ``by the clock`` stands beside them. On a GPU
both are the clock's.
Writes ``benchmarks/results/speed_search_loops.{json,csv,png}``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.speed.results import GPU, SECOND, bars, in_process, metric, result, seconds, write
from pav.cli.run import run
from pav.core.seeds import seed_of
from pav.core.statistics import bootstrap
from pav.core.steps import scoring_position
from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.engine.vllm import VllmEngine
from pav.policy.cost import Cost
from pav.policy.inference import Engine, Read, Sampled
from pav.policy.policy import Policy, Sampler
from pav.tasks.base import Problem
from pav.tasks.tape import Tape
from pav.verifier.checkpoint import Verifier, load_model, load_verifier, trunk_path
from pav.verifier.scoring import NO_LOGPROBS, PrefixScore, Scorer
from pav.verifier.trunk import HeadedTrunk
from search.run.opening import open_session
from search.run.records import Record
from search.run.session import Session
from search.run.solve import beam_record, beam_settings

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.speed.search_loops"
SEQUENTIAL = {1: 10.0, 16: 4.0}
BARRIER = 1.3


@dataclass(frozen=True)
class LoopsConfig:
    """Beam search against the loops of others.

    Args:
        verifier: a verifier that is served in an engine of its own.
        fused: a verifier that is served by the policy's engine (barrier only).
        problems: how many.
        barrier_n: beam widths against the barrier.
        concurrency: problems in flight.
        engine: device settings.
    """

    verifier: str = "pav:reference"
    fused: str = "pav:reference_fused"
    problems: int = 64
    barrier_n: list[int] = field(default_factory=lambda: [1, 4])
    concurrency: int = 64
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class Batched:
    """A verifier in transformers that reads full texts in one batch, when all are there."""

    scorer: Scorer
    model: HeadedTrunk
    policy: VllmEngine
    fused: bool = False
    waiting: list[tuple[list[int], asyncio.Future[Read]]] = field(default_factory=list)

    @property
    def base_head(self) -> str:
        return self.scorer.base_head

    @property
    def described(self) -> dict[str, Any]:
        return self.scorer.described

    @property
    def values(self) -> Any:
        return self.scorer.values

    async def read(
        self,
        problem: Problem,
        ids: Sequence[int],
        ends: Sequence[int],
        cost: Cost,
        known: np.ndarray = NO_LOGPROBS,
    ) -> PrefixScore:
        """As :meth:`Scorer.read`; nothing is remembered from the steps before."""
        prompt = self.scorer.trunk.encode(problem)
        stop = scoring_position(len(prompt), ends[-1] if ends else 0) + 1
        future: asyncio.Future[Read] = asyncio.get_running_loop().create_future()
        self.waiting.append(([*prompt, *ids][:stop], future))
        out = await future
        cost.read(out)
        logprobs = np.concatenate([np.asarray(out.logprobs)[len(prompt) - 1 :], np.zeros(1)])
        values = self.values(out.heads, logprobs if ends else NO_LOGPROBS, ids, ends)
        return PrefixScore(values, logprobs.astype(np.float32))

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    @torch.inference_mode()
    def step(self) -> None:
        """One forward pass over all that wait, once the policy has nothing left to sample."""
        if self.policy.busy:
            return
        texts, self.waiting = self.waiting, []
        ids_BT = torch.zeros(len(texts), max(len(ids) for ids, _ in texts), dtype=torch.long)
        for row, (ids, _) in zip(ids_BT, texts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        ids_BT = ids_BT.to(self.model.head.weight.device)
        states_BTD = self.model.hidden(ids_BT)
        last_BD = states_BTD[range(len(texts)), [len(ids) - 1 for ids, _ in texts]]
        heads_BH = (self.model.head_logits(last_BD) - self.model.head.bias).float().cpu().numpy()
        logprobs_BT = self.model.token_logprobs(states_BTD, ids_BT).float().cpu().numpy()
        for (ids, future), heads, logprobs in zip(texts, heads_BH, logprobs_BT, strict=True):
            future.set_result(Read(heads, logprobs[: len(ids) - 1], len(ids), 0))

    def start(self) -> None:
        """Loaded as it is."""

    def reset_prefix_cache(self) -> None:
        """There is none."""


@dataclass
class Barrier:
    """An engine that answers nobody before it can answer everybody."""

    engine: VllmEngine
    waiting: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def score_ids(self) -> list[int]:
        return self.engine.score_ids

    @property
    def busy(self) -> int:
        return self.engine.busy or len(self.waiting)

    def step(self) -> None:
        if self.engine.busy:
            self.engine.step()
            return
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            future.set_result(None)

    async def sample(self, *args: Any, **kwargs: Any) -> Sampled:
        out = await self.engine.sample(*args, **kwargs)
        await self._everybody()
        return out

    async def read(self, *args: Any, **kwargs: Any) -> Read:
        out = await self.engine.read(*args, **kwargs)
        await self._everybody()
        return out

    def _everybody(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        return future

    def start(self) -> None:
        self.engine.start()

    def reset_prefix_cache(self) -> None:
        self.engine.reset_prefix_cache()


@dataclass(frozen=True)
class Timed:
    """One way, measured."""

    way: str
    records: list[Record]
    clock: float
    spent: float

    @property
    def row(self) -> dict[str, Any]:
        """For the table."""
        return {
            "way": self.way,
            "problems": len(self.records),
            "seconds": round(self.clock, 2),
            "spent": round(self.spent, 2),
            "policy_tokens": sum(r.policy_tokens for r in self.records),
            "accuracy": float(np.mean([r.correct for r in self.records])),
        }


def loops(config: LoopsConfig) -> None:
    """Measure and write (see the module)."""
    metrics, rows = _sequential(config)
    more, other = _barrier(config)
    write("search_loops", metrics + more, rows + other, [0], config.problems, COMMAND)
    bars(
        [(r["way"], r["problems"] / r["spent"]) for r in rows + other],
        f"problems per {SECOND} (log)",
        result("search_loops", "png"),
        log=True,
    )


def _sequential(config: LoopsConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    verifier = load_verifier(config.verifier)
    session = open_session(verifier, None, None, None, config.engine)
    scorer = session.scorer(verifier, "separate", True, None)
    engine = in_process(session.sampling_engine(scorer))
    problems = session.problems("test", config.problems)
    model = load_model(verifier, trunk_path(verifier)).to("cuda" if GPU else "cpu")
    batched = Batched(scorer, model, engine)
    metrics, rows = [], []
    for n, least in SEQUENTIAL.items():
        ours = _searched(session, verifier, scorer, problems, n, config.concurrency, f"ours N={n}")
        session.readers["batched"] = batched  # type: ignore[assignment]
        theirs = _searched(session, verifier, batched, problems, n, 1, f"sequential N={n}")
        del session.readers["batched"]
        in_flight = 3 * n
        raw = [
            raw_rate(engine, session.policy, session.sampler, problems, flying)
            for flying in (in_flight, min(config.engine.max_num_seqs, in_flight * config.problems))
        ]
        rows += [ours.row, theirs.row]
        difference = bootstrap(
            np.array([[a.correct - float(b.correct)]
                      for a, b in zip(ours.records, theirs.records, strict=True)])
        )  # fmt: skip
        at = f"over the sequential loop, N={n}"
        metrics += [
            metric(f"beam search, problems/s {at}", theirs.spent / ours.spent, (">=", least)),
            metric(f"beam search, problems/s {at}, by the clock", theirs.clock / ours.clock),
            metric(f"accuracy minus that of the sequential loop, N={n}", difference.mean, None,
                   (difference.low, difference.high)),
            metric(f"raw vLLM, tokens/s, {in_flight} sequences in flight", raw[0]),
            metric(f"raw vLLM, tokens/s, as many in flight as ours at N={n}", raw[1]),
            metric(f"ceiling of generation alone {at}", raw[1] / raw[0]),
        ]  # fmt: skip
    session.shutdown()
    return metrics, rows


def _barrier(config: LoopsConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ours against a barrier, on tapes of 2 to 16 operations; fused and separate."""
    each = -(-config.problems // 15)
    problems = [
        problem
        for operations in range(2, 17)
        for problem in islice(Tape(n_ops=operations).problems("test"), each)
    ]
    # As they would come: long and short ones mixed.
    np.random.default_rng(0).shuffle(problems)
    metrics, rows = [], []
    for mode, name in (("fused", config.fused), ("separate", config.verifier)):
        verifier = load_verifier(name)
        longer = replace(verifier.card.sampler_config(), max_length=256)
        session = open_session(verifier, None, None, longer, config.engine)
        scorer = session.scorer(verifier, "auto", True, None)
        session.sampling_engine(scorer)
        engines = dict(session.engines)
        for n in config.barrier_n:
            label = f"{mode}, N={n}"
            ours = _searched(
                session, verifier, scorer, problems, n, len(problems), f"ours, {label}"
            )
            session.engines |= {k: Barrier(e) for k, e in engines.items()}  # type: ignore[misc]
            held = replace(scorer, engine=_of(session, engines, scorer.engine))
            theirs = _searched(
                session, verifier, held, problems, n, len(problems), f"barrier, {label}"
            )
            session.engines |= engines
            rows += [ours.row, theirs.row]
            same = np.mean([a.correct == b.correct for a, b in
                            zip(ours.records, theirs.records, strict=True)])  # fmt: skip
            at = f"over the barrier, {label}"
            metrics += [
                metric(f"beam search, problems/s {at}", theirs.spent / ours.spent, (">=", BARRIER)),
                metric(f"beam search, problems/s {at}, by the clock", theirs.clock / ours.clock),
                metric(f"problems with the same outcome, {label}", float(same)),
            ]
        session.shutdown()
    return metrics, rows


def _of(session: Session, engines: Mapping[str, Engine], engine: Engine) -> Any:
    """What stands in the place of ``engine`` now."""
    return next(session.engines[name] for name, own in engines.items() if own is engine)


def _searched(
    session: Session,
    verifier: Verifier,
    scorer: Any,
    problems: list[Problem],
    n: int,
    concurrency: int,
    way: str,
) -> Timed:
    settings = beam_settings(verifier.card, n, 3, None, None)

    async def search(problem: Problem) -> Record:
        return await beam_record(session, scorer, settings, "orm", "beam", 0, problem)

    with TemporaryDirectory() as directory:
        clock, spent = time.perf_counter(), seconds()
        found, _ = session.run(Path(directory) / "r.jsonl", problems, search, concurrency, way)
        return Timed(way, found, time.perf_counter() - clock, seconds() - spent)


def raw_rate(
    engine: VllmEngine,
    policy: Policy,
    sampler: Sampler,
    problems: Sequence[Problem],
    in_flight: int,
) -> float:
    """Tokens per second of whole solutions, ``in_flight`` at a time, no scores."""
    count = max(4 * in_flight, 256)
    prompts = [policy.encode(problems[i % len(problems)]) for i in range(count)]
    tokens = 0

    def keep(out: Sampled) -> None:
        nonlocal tokens
        tokens += len(out.ids)

    jobs = [
        partial(
            engine.sample,
            prompt,
            sampler,
            stop_ids=sorted(policy.stepper.eos_ids),
            max_tokens=sampler.max_length - len(prompt),
            seed=seed_of("raw", i),
        )
        for i, prompt in enumerate(prompts)
    ]
    engine.start()
    engine.reset_prefix_cache()
    started = seconds()
    drive([engine], jobs, keep, in_flight)
    return tokens / (seconds() - started)


if __name__ == "__main__":
    run(loops, LoopsConfig, "benchmarks.speed.search_loops")
