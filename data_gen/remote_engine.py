"""``data_gen.rollouts --workers N``: engines in processes of their own, behind one queue.

What a label run asks for, in which order, how it grades and what it writes stays in the process
that the user started: it is the same code for any number of workers, and so are the requests (ids
and seeds). Only the engines are elsewhere: a :class:`RemoteEngine` puts requests into the queue of
a :class:`~pav.engine.pool.Pool`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pav.core.steps import Stepper
from pav.engine.gpu_memory import share_gpu
from pav.engine.loading import EngineConfig
from pav.engine.pool import Pool, Transport
from pav.engine.vllm import VllmEngine
from pav.engine.worker import Loaded
from pav.policy.inference import Sampled, Usage
from pav.policy.policy import Dtype, Sampler


@dataclass(frozen=True)
class Model:
    """What :class:`~pav.engine.vllm.VllmEngine` takes; ``until`` of all that is sampled from it."""

    path: str
    dtype: Dtype
    max_length: int
    config: EngineConfig
    until: Stepper | None = None


@dataclass(frozen=True)
class Call:
    """A call of :meth:`~pav.engine.vllm.VllmEngine.sample` of the ``model``-th engine."""

    model: int
    ids: list[int]
    sampler: Sampler
    stop_ids: list[int]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Models:
    """The job of a label run's workers: an engine for each model."""

    models: Sequence[Model]

    def load(self) -> Loaded:
        """See :class:`pav.engine.worker.Job`."""
        models = self.models
        # Here, not where the run is led: that may be a machine without a GPU.
        served = [(m.path, m.dtype) for m in models]
        shared = share_gpu(models[0].config, served, models[0].max_length, say=False)
        engines = [
            VllmEngine(m.path, m.dtype, m.max_length, config=settings)
            for m, settings in zip(models, shared, strict=True)
        ]
        for engine in engines:
            engine.start()

        async def answer(call: Call) -> Sampled:
            return await engines[call.model].sample(
                call.ids,
                call.sampler,
                stop_ids=call.stop_ids,
                max_tokens=call.max_tokens,
                seed=call.seed,
                until=models[call.model].until,
            )

        return Loaded(engines, answer, lambda: tuple(engine.in_flight for engine in engines))


@dataclass(frozen=True)
class RemoteEngine:
    """The ``model``-th engine of every worker, used as one :class:`~pav.engine.vllm.VllmEngine`."""

    pool: Pool
    model: int
    usage: Usage = field(default_factory=Usage)

    @property
    def busy(self) -> bool:
        """Whether requests wait for a step; one engine of a pool turns it for all."""
        return self.model == 0 and self.pool.busy

    @property
    def in_flight(self) -> int:
        """As of a :class:`~pav.engine.vllm.VllmEngine`."""
        return self.pool.in_flight(self.model)

    def step(self) -> None:
        """Turn the pool (see :meth:`~pav.engine.pool.Pool.step`)."""
        self.pool.step()

    async def sample(
        self,
        ids: Sequence[int],
        sampler: Sampler,
        *,
        stop_ids: Sequence[int],
        max_tokens: int,
        seed: int,
        until: Stepper | None = None,
    ) -> Sampled:
        """Sample up to ``max_tokens`` after ``ids``; ``until`` is that of the pool's model."""
        future: asyncio.Future[Sampled] = asyncio.get_running_loop().create_future()

        def answered(answer: Sampled) -> None:
            self.usage.generated += len(answer.ids)
            self.usage.prefilled += answer.prefilled
            self.usage.cached += answer.cached
            if not future.done():
                future.set_result(answer)

        call = Call(self.model, list(ids), sampler, list(stop_ids), max_tokens, seed)
        self.pool.submit(call, answered, queue=self.model)
        return await future

    @property
    def lines(self) -> list[str]:
        """What to show of the workers; one engine of a pool shows them for all."""
        return self.pool.lines if self.model == 0 else []

    def shutdown(self) -> None:
        """End the workers of the pool."""
        if self.model == 0:
            self.pool.close()


def remote_engines(
    transport: Transport, models: Sequence[Model], count: int, note: Path | None = None
) -> list[RemoteEngine]:
    """An engine for each of ``models``, in each of ``count`` workers.

    Args:
        transport: how the workers are started and reached.
        models: what every worker loads.
        count: workers.
        note: see :class:`~pav.engine.pool.Pool`.

    Raises:
        UserError: if workers cannot be started.
    """
    most = models[0].config.max_num_seqs
    # What an engine can run, and a lease or two that wait.
    lease = max(1, most // 8)
    pool = Pool(
        transport,
        count,
        "requests",
        lambda answer: len(answer.ids),
        queues=len(models),
        room=most + 2 * lease,
        lease=lease,
        note=note,
    )
    try:
        pool.load(Models(models))
    except BaseException:
        pool.close()
        raise
    return [RemoteEngine(pool, i) for i in range(len(models))]
