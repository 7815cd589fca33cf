"""What a worker does, wherever it runs, and what it and the process that leads say to each other.

A worker is given a job, loads its engines and answers its items until the next job comes. What
crosses to it are our own classes with the user's task in them; what comes back are plain records.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from time import monotonic
from typing import Any, Protocol

from pav.core.errors import UserError
from pav.engine.loop import Driven, drive


@dataclass(frozen=True)
class Loaded:
    """A job whose engines are there.

    Attributes:
        engines: what the worker turns.
        answer: called with an item; its result is the answer.
        in_flight: tokens that the items in work have so far, by queue of the pool; may be empty.
    """

    engines: Sequence[Driven]
    answer: Callable[[Any], Coroutine[Any, Any, Any]]
    in_flight: Callable[[], tuple[int, ...]] = tuple


class Job(Protocol):
    """What items are answered with; it is sent to every worker."""

    def load(self) -> Loaded:
        """Load, in a worker, what an earlier job has not.

        Raises:
            UserError: for a reason that another try does not mend.
        """


@dataclass(frozen=True)
class Load:
    """Leader to worker: the job of the items that will follow.

    Attributes:
        number: of the job.
        job: what to load.
        beat: seconds after which a worker that has nothing else to say says that it is alive.
    """

    number: int
    job: Job
    beat: float


# Leader to worker: (number, content) of items.
Lease = list[tuple[int, Any]]


@dataclass(frozen=True)
class Alive:
    """Worker to leader: the job is here, or engines step though nothing has finished for a while.

    Attributes:
        tokens: see :attr:`Loaded.in_flight`.
    """

    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Started:
    """Worker to leader: the job of this number is loaded."""

    job: int
    process: int
    host: str


@dataclass(frozen=True)
class Finished:
    """Worker to leader: (item number, answer) of what one step finished."""

    answers: list[tuple[int, Any]]


@dataclass(frozen=True)
class Refused:
    """Worker to leader: what the user can mend; the worker ends."""

    error: str


@dataclass(frozen=True)
class Died:
    """A worker is gone; all that it sent before was received before."""

    reason: str


Message = Alive | Started | Finished | Refused | Died
Inbox = SimpleQueue[Load | Lease]
Send = Callable[[Message], None]


def serve(inbox: Inbox, send: Send) -> None:
    """What a worker does until its process ends."""
    following: list[Load | Lease] = [inbox.get()]
    try:
        while True:
            # Given away: a job may hold weights, which nobody needs once they are loaded.
            following.append(_work(following.pop(), inbox, send))
    except UserError as error:
        send(Refused(str(error)))


def _work(load: Load | Lease, inbox: Inbox, send: Send) -> Load:
    """Answer the items of a job; the next job."""
    assert isinstance(load, Load)
    send(Alive())
    loaded, beat = load.job.load(), load.beat
    send(Started(load.number, os.getpid(), socket.gethostname()))
    del load
    following: list[Load] = []
    drive(loaded.engines, [partial(_answer, loaded, beat, inbox, send)], following.append, 1)
    return following[0]


async def _answer(loaded: Loaded, beat: float, inbox: Inbox, send: Send) -> Load:
    running: dict[asyncio.Task[Any], int] = {}
    finished: list[asyncio.Task[Any]] = []
    said = monotonic()
    while True:
        # With nothing to do it blocks: no engine is busy then.
        while not running or not inbox.empty():
            message = inbox.get()
            if isinstance(message, Load):
                return message
            for number, content in message:
                task = asyncio.ensure_future(loaded.answer(content))
                task.add_done_callback(finished.append)
                running[task] = number
        # An engine's step is between two turns of this loop, or none.
        await asyncio.sleep(0)
        if finished:
            send(Finished([(running.pop(t), t.result()) for t in finished]))
            finished.clear()
            said = monotonic()
        elif monotonic() - said > beat:
            send(Alive(loaded.in_flight()))
            said = monotonic()
