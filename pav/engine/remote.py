"""``--workers N``: engines in processes of their own, behind one queue.

What a run asks for, in which order, how it grades and what it writes stays in the process that the
user started: it is the same code for any number of workers, and so are the requests (ids and
seeds). Only the engines are elsewhere: a :class:`RemoteEngine` puts requests into the queue of a
:class:`~pav.engine.pool.Pool`.

New weights are a new job of the pool: every worker has them before it answers anything more, and
one that is started again begins with them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from pav.core.steps import Ending
from pav.engine.gpu_memory import share_gpu
from pav.engine.loading import EngineConfig
from pav.engine.pool import Pool, Transport
from pav.engine.vllm import VllmEngine
from pav.engine.weights import Packed, check_weights, packed, served_shapes
from pav.engine.worker import Loaded
from pav.policy.inference import Sampled, Usage
from pav.policy.policy import Dtype, Sampler

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Model:
    """What :class:`~pav.engine.vllm.VllmEngine` takes, and each ``until`` that samples may name.

    With ``weights`` the engine serves them, and not those of the directory.
    """

    path: str
    dtype: Dtype
    max_length: int
    config: EngineConfig
    untils: tuple[Ending, ...] = ()
    trained: bool = False
    weights: Packed | None = None


@dataclass(frozen=True)
class Call:
    """A call of :meth:`~pav.engine.vllm.VllmEngine.sample` of the ``model``-th engine.

    ``until`` is a place in its model's.
    """

    model: int
    ids: list[int]
    sampler: Sampler
    stop_ids: list[int]
    max_tokens: int
    seed: int
    logprobs: bool = False
    until: int | None = None


@dataclass(frozen=True)
class Models:
    """The job of workers that sample: an engine for each model."""

    models: Sequence[Model]

    def load(self) -> Loaded:
        """See :class:`pav.engine.worker.Job`."""
        models = self.models
        # Here, not where the run is led: that may be a machine without a GPU.
        served = [(m.path, m.dtype) for m in models]
        shared = share_gpu(models[0].config, served, models[0].max_length, say=False)
        engines = [
            _engine(i, m.path, m.dtype, m.max_length, settings, m.trained)
            for i, (m, settings) in enumerate(zip(models, shared, strict=True))
        ]
        for engine, m in zip(engines, models, strict=True):
            engine.start()
            if m.weights is not None:
                engine.load_weights(m.weights.state(), m.weights.version)

        async def answer(call: Call) -> Sampled:
            return await engines[call.model].sample(
                call.ids,
                call.sampler,
                stop_ids=call.stop_ids,
                max_tokens=call.max_tokens,
                seed=call.seed,
                logprobs=call.logprobs,
                until=None if call.until is None else models[call.model].untils[call.until],
            )

        return Loaded(engines, answer, lambda: tuple(engine.in_flight for engine in engines))


@cache
def _engine(
    number: int, path: str, dtype: Dtype, max_length: int, config: EngineConfig, trained: bool
) -> VllmEngine:
    """The engine of a worker's ``number``-th model, whatever job it is asked for in."""
    return VllmEngine(path, dtype, max_length, config=config, trained=trained)


@dataclass(frozen=True)
class RemoteEngine:
    """The ``model``-th engine of every worker, used as one :class:`~pav.engine.vllm.VllmEngine`.

    Attributes:
        pool: the workers.
        models: what they serve; the engines of a pool have one list of them.
        model: which of them.
        usage: tokens that were worked through.
    """

    pool: Pool
    models: list[Model]
    model: int
    usage: Usage = field(default_factory=Usage)

    @property
    def dtype(self) -> Dtype:
        """Of its weights."""
        return self.models[self.model].dtype

    @property
    def version(self) -> int:
        """Of its weights; 0 for those of the directory."""
        weights = self.models[self.model].weights
        return weights.version if weights is not None else 0

    def start(self) -> None:
        """Wait until every worker that has a place serves its models, or its new weights.

        Raises:
            UserError: if a worker cannot, or workers die again and again.
        """
        while not self.pool.ready:
            self.pool.step()

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """As of :class:`~pav.engine.vllm.VllmEngine`; a copy of ``state`` goes to every worker.

        It does not wait for them: who has the weights answers.

        Raises:
            UserError: naming a tensor that is missing, unknown or of another shape.
            RuntimeError: if requests are in work.
        """
        model = self.models[self.model]
        if not model.trained:
            raise RuntimeError("these engines keep their weights; make the model with trained=True")
        if self.pool.busy:
            raise RuntimeError("requests are in work; weights change between requests")
        if version < self.version:
            raise RuntimeError(f"weights of version {version} come after those of {self.version}")
        check_weights(model.path, served_shapes(model.path), state)
        self.models[self.model] = replace(model, weights=packed(state, version))
        self.pool.load(Models(tuple(self.models)))

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
        logprobs: bool = False,
        until: Ending | None = None,
    ) -> Sampled:
        """Sample up to ``max_tokens`` after ``ids``; ``until`` is one that the model names.

        Raises:
            RuntimeError: if a worker answers with other weights than it was given.
        """
        future: asyncio.Future[Sampled] = asyncio.get_running_loop().create_future()
        version = self.version

        def answered(answer: Sampled) -> None:
            self.usage.generated += len(answer.ids)
            self.usage.prefilled += answer.prefilled
            self.usage.cached += answer.cached
            if future.done():
                return
            if answer.version == version:
                future.set_result(answer)
            else:
                said = f"a worker sampled with weights of version {answer.version}, not {version}"
                future.set_exception(RuntimeError(said))

        end = None
        if until is not None and until.is_watching:
            end = self.models[self.model].untils.index(until)
        stops = list(stop_ids)
        call = Call(self.model, list(ids), sampler, stops, max_tokens, seed, logprobs, end)
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
    served = list(models)
    try:
        pool.load(Models(tuple(served)))
    except BaseException:
        pool.close()
        raise
    return [RemoteEngine(pool, served, i) for i in range(len(served))]
