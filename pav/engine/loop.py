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
# A resolved future wakes its coroutine through gather: a few turns of the event loop.
WAKES = 4


class Driven(Protocol):
    """What is turned here: an :class:`Engine`, or one that is in another process."""

    @property
    def busy(self) -> int: ...

    def step(self) -> None: ...


class Turns:
    """Turns engines, one step each at a time, while others of the same event loop ask them.

    Args:
        engines: what is turned.
    """

    def __init__(self, engines: Sequence[Driven]) -> None:
        self.engines = engines
        self._waited = [0] * len(engines)

    async def turn(self) -> bool:
        """Let everybody ask who can, then step what is busy; whether anything was."""
        for _ in range(WAKES):
            await asyncio.sleep(0)
        stepped = False
        busy = [engine.busy for engine in self.engines]
        for i, engine in enumerate(self.engines):
            if not busy[i]:
                continue
            if busy[i] * FEW < max(busy) and self._waited[i] < PATIENCE:
                self._waited[i] += 1
                continue
            self._waited[i] = 0
            engine.step()
            stepped = True
        return stepped


async def run_jobs(
    engines: Sequence[Driven],
    jobs: Iterable[Callable[[], Coroutine[Any, Any, T]]],
    on_result: Callable[[T], None],
    concurrency: int,
) -> None:
    """Run ``jobs``, ``concurrency`` at a time, on ``engines``; ``on_result`` as each one finishes.

    No clock takes part: a repeat on the same machine takes the same course. An exception in a job
    ends the run; what ``on_result`` was given is done, and the other jobs are cancelled.

    Raises:
        RuntimeError: if jobs wait for something that none of ``engines`` will answer.
    """
    turns = Turns(engines)
    waiting = iter(jobs)
    # Ordered: results that one step finished are reported in the order of their jobs.
    active: dict[asyncio.Task[T], None] = {}
    exhausted = False
    idle = 0
    try:
        while True:
            while not exhausted and len(active) < concurrency:
                job = next(waiting, None)
                if job is None:
                    exhausted = True
                else:
                    active[asyncio.ensure_future(job())] = None
            if not active:
                return
            stepped = await turns.turn()
            finished = [task for task in active if task.done()]
            idle = 0 if stepped or finished else idle + 1
            if idle > IDLE_TURNS:
                raise RuntimeError(
                    f"{len(active)} jobs wait and no engine is busy; jobs may wait for the engines "
                    "that they were started with and for nothing else"
                )
            for task in finished:
                del active[task]
                on_result(task.result())
    finally:
        for task in active:
            task.cancel()
        await asyncio.gather(*active, return_exceptions=True)


def drive(
    engines: Sequence[Driven],
    jobs: Iterable[Callable[[], Coroutine[Any, Any, T]]],
    on_result: Callable[[T], None],
    concurrency: int,
) -> None:
    """:func:`run_jobs` to its end, also where an event loop is running, as in a notebook.

    That loop stands still meanwhile, as it does in every function that is not a coroutine.
    """
    running = asyncio._get_running_loop()
    # A loop of our own in this thread: engines stay in the thread that started them, Ctrl-C
    # reaches the jobs, and the loop that is there is neither closed nor replaced. asyncio allows
    # one running loop in a thread; the other one is put aside for as long as it stands still.
    asyncio._set_running_loop(None)
    try:
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            runner.run(run_jobs(engines, jobs, on_result, concurrency))
    finally:
        asyncio._set_running_loop(running)
