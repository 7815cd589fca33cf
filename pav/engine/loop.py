"""The loop that turns engines and runs the jobs that wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
# A resolved request reaches its job in a few turns; far more without any work is a dead end.
IDLE_TURNS = 1000
# A step costs about the same for one request as for thirty. So an engine with few requests, beside
# one with FEW times as many, lets up to PATIENCE turns pass until more have come.
FEW, PATIENCE = 8, 4


class Driven(Protocol):
    """What :func:`drive` turns: an :class:`Engine`, or one that is in another process."""

    @property
    def busy(self) -> int: ...

    def step(self) -> None: ...


def drive(
    engines: Sequence[Driven],
    jobs: Iterable[Callable[[], Coroutine[Any, Any, T]]],
    on_result: Callable[[T], None],
    concurrency: int,
) -> None:
    """Run ``jobs``, ``concurrency`` at a time, on ``engines``; ``on_result`` as each one finishes.

    No clock takes part: a repeat on the same machine takes the same course. An exception in a job
    ends the run; what ``on_result`` was given is done.

    Raises:
        RuntimeError: if jobs wait for something that none of ``engines`` will answer.
    """

    async def loop() -> None:
        waiting = iter(jobs)
        # Ordered: results that one step finished are reported in the order of their jobs.
        active: dict[asyncio.Task[T], None] = {}
        exhausted = False
        idle = 0
        waited = [0] * len(engines)
        while True:
            while not exhausted and len(active) < concurrency:
                job = next(waiting, None)
                if job is None:
                    exhausted = True
                else:
                    active[asyncio.ensure_future(job())] = None
            if not active:
                return
            # A resolved future wakes its coroutine through gather: a few turns of the event loop.
            for _ in range(4):
                await asyncio.sleep(0)
            stepped = False
            busy = [engine.busy for engine in engines]
            for i, engine in enumerate(engines):
                if not busy[i]:
                    continue
                if busy[i] * FEW < max(busy) and waited[i] < PATIENCE:
                    waited[i] += 1
                    continue
                waited[i] = 0
                engine.step()
                stepped = True
            finished = [task for task in active if task.done()]
            idle = 0 if stepped or finished else idle + 1
            if idle > IDLE_TURNS:
                raise RuntimeError(
                    f"{len(active)} jobs wait and no engine is busy; jobs may wait for the engines "
                    "that drive() was given and for nothing else"
                )
            for task in finished:
                del active[task]
                on_result(task.result())

    asyncio.run(loop())
