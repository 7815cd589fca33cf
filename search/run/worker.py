"""A worker process of ``--workers N``: what it is sent, what it sends, and what it does."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from time import monotonic
from typing import Any

from pav.core.errors import UserError
from pav.engine.loop import Driven, drive
from pav.engine.processes import work
from search.run.records import Record

# A function of a module, its arguments bound with functools.partial: it crosses to the workers.
Search = Callable[..., Coroutine[Any, Any, Record]]
# What it is given: a problem, and in some searches more.
Given = tuple[Any, ...]


@dataclass(frozen=True)
class Job:
    """Leader to worker: a session and a :data:`Search`, pickled; how many problems at a time.

    At most every ``beat`` seconds the worker says that its engines step.
    """

    pickled: bytes
    concurrency: int
    beat: float


@dataclass(frozen=True)
class Alive:
    """Worker to leader: the job is here, or engines step though no search has ended for a while."""


@dataclass(frozen=True)
class Ask:
    """Worker to leader: engines are loaded; a problem, please. The answer is one, or None."""


@dataclass(frozen=True)
class Found:
    """Worker to leader: what a search left."""

    record: Record


@dataclass(frozen=True)
class Refused:
    """Worker to leader: what the user can mend."""

    error: str


def serve(_: None, inbox: SimpleQueue[Any], send: Callable[[Any], None]) -> None:
    """What a worker does: searches, one job after another, until its process ends."""
    while True:
        job: Job = inbox.get()
        send(Alive())
        try:
            session, search = pickle.loads(job.pickled)  # noqa: S301 (from the one that leads)
            served = session.served
            session.start()
            for engine in served:
                engine.reset_prefix_cache()
            asked = _asked(search, inbox, send)
            pulse = _Pulse(job.beat, send)
            watched = [_Watched(engine, pulse) for engine in served]
            drive(watched, asked, lambda record: send(Found(record)), job.concurrency)
        except UserError as error:
            send(Refused(str(error)))
            return


@dataclass
class _Pulse:
    """Says that engines step, at most every ``seconds``."""

    seconds: float
    send: Callable[[Any], None]
    said: float = field(default_factory=monotonic)

    def beat(self) -> None:
        if monotonic() - self.said > self.seconds:
            self.send(Alive())
            self.said = monotonic()


@dataclass(frozen=True)
class _Watched:
    """An engine or reward model as ``drive`` turns it; a step of it is a sign of life."""

    engine: Driven
    pulse: _Pulse

    @property
    def busy(self) -> int:
        return self.engine.busy

    def step(self) -> None:
        self.engine.step()
        self.pulse.beat()


def _asked(
    search: Search, inbox: SimpleQueue[Any], send: Callable[[Any], None]
) -> Iterator[Callable[[], Coroutine[Any, Any, Record]]]:
    """What the leading process hands out. One is asked for ahead, so that none is waited for."""
    send(Ask())
    while (given := inbox.get()) is not None:
        send(Ask())
        yield partial(search, *given)


def main(fd: int) -> None:
    """What a worker process runs; ``fd`` is its connection to the process that leads."""
    work(fd, serve)
