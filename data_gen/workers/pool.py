"""The queue in front of engines that are in other processes: leases, deaths, restarts.

Requests wait in one queue per model. A worker gets a lease, a run of successive requests (which
mostly share a prefix), while it holds fewer than it can run and a lease more. What a dead worker
held goes back to the front, to whoever has room; only the first answer to a request counts. A
worker that holds requests says every half a minute that its engine still steps; silence is a death.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time
from typing import Protocol

from pav.core.errors import UserError
from pav.core.files import json_text, replace_file
from pav.core.steps import Stepper
from pav.engine.loading import EngineConfig
from pav.engine.processes import Died
from pav.policy.inference import Sampled, Usage
from pav.policy.policy import Dtype, Sampler

WORKERS = "workers.json"
# A worker that dies so often within so many seconds ends the run.
DEATHS, DEATH_SECONDS = 3, 600.0
# A worker with requests is heard of so often, and ended when it was silent for so long: a single
# step of an engine takes seconds at most.
BEAT_SECONDS, SILENT_SECONDS = 30.0, 600.0
_POLL_SECONDS = 0.2
_NOTE_SECONDS = 10.0
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Model:
    """What :class:`~pav.engine.vllm.Engine` takes; ``until`` of all that is sampled from it."""

    path: str
    dtype: Dtype
    max_length: int
    config: EngineConfig
    until: Stepper | None = None


@dataclass(frozen=True)
class Call:
    """A call of :meth:`~pav.engine.vllm.Engine.sample` of the ``model``-th engine."""

    number: int
    model: int
    ids: list[int]
    sampler: Sampler
    stop_ids: list[int]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Started:
    """A worker has loaded its models."""

    process: int
    host: str


@dataclass(frozen=True)
class Finished:
    """(request number, answer) of what one step finished."""

    answers: list[tuple[int, Sampled]]


@dataclass(frozen=True)
class Alive:
    """A worker's engines step, though nothing has finished for a while.

    Attributes:
        tokens: by model, what the requests in work have so far.
    """

    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Refused:
    """A worker cannot load a model, for a reason that another try does not mend."""

    error: str


Message = Started | Alive | Finished | Refused | Died


class Transport(Protocol):
    """How workers are started and reached."""

    def start(self, worker: int) -> None:
        """Start a worker, or one in place of a dead one."""

    def send(self, worker: int, calls: list[Call]) -> None:
        """Give requests to a worker, dead or alive, without waiting for it."""

    def receive(self, seconds: float) -> list[tuple[int, Message]]:
        """(worker, message) of what comes within ``seconds``; returns with the first of it."""

    def end(self, worker: int) -> None:
        """End a worker that does not answer; nothing more is received of it."""

    def close(self) -> None:
        """End all workers, within seconds."""


@dataclass
class _Worker:
    held: list[dict[int, Call]]
    in_flight: list[int]
    started: Started | None = None
    since: float = 0.0
    heard: float = 0.0
    rollouts: int = 0
    tokens: int = 0
    tokens_here: int = 0
    deaths: list[float] = field(default_factory=list)

    @property
    def holds(self) -> int:
        return sum(map(len, self.held))

    @property
    def tokens_per_second(self) -> float:
        """Since it started last."""
        return self.tokens_here / max(monotonic() - self.since, 1e-9) if self.started else 0.0


class Pool:
    """Engines of ``models`` in each of ``count`` workers. Close it at the end.

    Args:
        transport: how the workers are started and reached.
        models: what every worker loads.
        count: workers.
        note: file that tells ``data_gen.status`` how they do; None writes none.
    """

    def __init__(
        self, transport: Transport, models: Sequence[Model], count: int, note: Path | None
    ) -> None:
        self._transport, self._note = transport, note
        self._noted = 0.0
        self._idle_since = monotonic()
        most = models[0].config.max_num_seqs
        self._lease = max(1, most // 8)
        self._most_held = most + 2 * self._lease
        self._queues: list[deque[Call]] = [deque() for _ in models]
        self._futures: dict[int, asyncio.Future[Sampled]] = {}
        self._next = 0
        self._workers = [_Worker([{} for _ in models], [0 for _ in models]) for _ in range(count)]
        self.engines = [RemoteEngine(self, i) for i in range(len(models))]
        try:
            for worker in range(count):
                transport.start(worker)
        except BaseException:
            transport.close()
            raise

    @property
    def busy(self) -> bool:
        """Whether requests wait for an answer."""
        return bool(self._futures)

    @property
    def lines(self) -> list[str]:
        """A line per worker."""
        return [
            f"worker {i}: {w.rollouts} samples, {w.tokens_per_second:.0f} tokens/s, {w.holds} held"
            if w.started
            else f"worker {i}: starting"
            for i, w in enumerate(self._workers)
        ]

    def in_flight(self, model: int) -> int:
        """Tokens that requests in work have so far, as far as the workers have said."""
        return sum(w.in_flight[model] for w in self._workers)

    def submit(self, model: int, ids: Sequence[int], sampler: Sampler, stop_ids: Sequence[int],
               max_tokens: int, seed: int) -> asyncio.Future[Sampled]:  # fmt: skip
        """Put a request at the end of the queue."""
        number, self._next = self._next, self._next + 1
        self._queues[model].append(
            Call(number, model, list(ids), sampler, list(stop_ids), max_tokens, seed)
        )
        future = asyncio.get_running_loop().create_future()
        self._futures[number] = future
        return future

    def step(self) -> None:
        """Lease what waits to who has room; resolve what comes back.

        Raises:
            UserError: if a worker cannot load a model, or dies again and again.
        """
        for queue in self._queues:
            self._give(queue)
        for number, message in self._transport.receive(_POLL_SECONDS):
            worker = self._workers[number]
            worker.heard = monotonic()
            match message:
                case Started():
                    worker.started, worker.since, worker.tokens_here = message, monotonic(), 0
                case Alive():
                    for i, tokens in enumerate(message.tokens):
                        worker.in_flight[i] = tokens
                case Finished():
                    for request, answer in message.answers:
                        self._resolve(worker, request, answer)
                case Refused():
                    raise UserError(f"worker {number}: {message.error}")
                case Died():
                    self._bury(number, message.reason)
        now = monotonic()
        for number, worker in enumerate(self._workers):
            if worker.started and worker.holds and now - worker.heard > SILENT_SECONDS:
                self._transport.end(number)
                self._bury(number, f"silent for {SILENT_SECONDS / 60:.0f} minutes, ended")
        if any(w.started for w in self._workers):
            self._idle_since = now
        elif now - self._idle_since > _PATIENCE_SECONDS:
            # A model may be large, or a cluster have no room.
            print(f"waiting: none of {len(self._workers)} workers has started", file=sys.stderr)
            self._idle_since = now
        if now - self._noted > _NOTE_SECONDS:
            self._write_note()

    def _give(self, queue: deque[Call]) -> None:
        ready = [(i, w) for i, w in enumerate(self._workers) if w.started]
        while queue and ready:
            model = queue[0].model
            number, worker = min(ready, key=lambda pair: len(pair[1].held[model]))
            held = worker.held[model]
            if len(held) + self._lease > self._most_held:
                return
            lease = [queue.popleft() for _ in range(min(self._lease, len(queue)))]
            if not worker.holds:  # it had nothing to say anything of
                worker.heard = monotonic()
            held.update((request.number, request) for request in lease)
            self._transport.send(number, lease)

    def _resolve(self, worker: _Worker, number: int, answer: Sampled) -> None:
        for model, held in enumerate(worker.held):
            if held.pop(number, None) is None:
                continue
            worker.rollouts += 1
            worker.tokens += len(answer.ids)
            worker.tokens_here += len(answer.ids)
            worker.in_flight[model] = max(0, worker.in_flight[model] - len(answer.ids))
            usage = self.engines[model].usage
            usage.generated += len(answer.ids)
            usage.prefilled += answer.prefilled
            usage.cached += answer.cached
            future = self._futures.pop(number)
            if not future.done():
                future.set_result(answer)

    def _bury(self, number: int, reason: str) -> None:
        worker, now = self._workers[number], monotonic()
        lost = worker.holds
        for queue, held in zip(self._queues, worker.held, strict=True):
            queue.extendleft(reversed(held.values()))
            held.clear()
        worker.started = None
        worker.in_flight = [0 for _ in worker.held]
        worker.deaths.append(now)
        recent = sum(now - at < DEATH_SECONDS for at in worker.deaths)
        if recent >= DEATHS:
            raise UserError(
                f"worker {number} died {recent} times within {DEATH_SECONDS / 60:.0f} minutes, at "
                f"last by {reason}; what it said is above. If memory was short lower workers, "
                "engine.kv_gib or engine.max_num_seqs; the same command resumes"
            )
        print(
            f"WARNING: worker {number} died ({reason}); the {lost} requests that it held go to "
            f"others, and it starts again ({recent} of {DEATHS - 1} times)",
            file=sys.stderr,
        )
        self._transport.start(number)

    def _write_note(self, ended: bool = False) -> None:
        self._noted = monotonic()
        if self._note is None:
            return
        workers = [
            {
                "process": w.started and f"{w.started.process} on {w.started.host}",
                "state": "ended" if ended else "running" if w.started else "starting",
                "held": w.holds,
                "samples": w.rollouts,
                "tokens": w.tokens,
                "tokens_per_second": round(w.tokens_per_second, 1),
                "deaths": len(w.deaths),
            }
            for w in self._workers
        ]
        waiting = sum(map(len, self._queues))
        content = {"at": round(time()), "waiting": waiting, "workers": workers}
        with suppress(OSError):  # the journal says so when a disk is full
            replace_file(self._note, json_text(content))

    def close(self) -> None:
        """End all workers; what they had not answered is dropped."""
        self._transport.close()
        self._write_note(ended=True)


def worker_lines(directory: Path) -> list[str]:
    """How the workers of a run are, or were last; none where it had none."""
    try:
        content = json.loads((directory / WORKERS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    waiting, ago = content["waiting"], time() - content["at"]
    lines = [f"workers of {directory}, {ago:.0f} s ago ({waiting} requests waited for one):"]
    for i, w in enumerate(content["workers"]):
        lines.append(
            f"  {i}: {w['state']}, process {w['process'] or '-'}, {w['samples']} samples, "
            f"{w['tokens_per_second']:.0f} tokens/s, {w['held']} held, died {w['deaths']} times"
        )
    return lines


@dataclass(frozen=True)
class RemoteEngine:
    """The ``model``-th engine of every worker, used as one :class:`~pav.engine.vllm.Engine`."""

    pool: Pool
    model: int
    usage: Usage = field(default_factory=Usage)

    @property
    def busy(self) -> bool:
        """Whether requests wait for a step; one engine of a pool turns it for all."""
        return self.model == 0 and self.pool.busy

    @property
    def in_flight(self) -> int:
        """As of an :class:`~pav.engine.vllm.Engine`."""
        return self.pool.in_flight(self.model)

    def step(self) -> None:
        """Turn the pool (see :meth:`Pool.step`)."""
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
        return await self.pool.submit(self.model, ids, sampler, stop_ids, max_tokens, seed)

    @property
    def lines(self) -> list[str]:
        """What to show of the workers; one engine of a pool shows them for all."""
        return self.pool.lines if self.model == 0 else []

    def shutdown(self) -> None:
        """End the workers of the pool."""
        if self.model == 0:
            self.pool.close()
