"""``data_gen.rollouts --workers N``: engines in processes of their own, behind one queue.

What a label run asks for, in which order, how it grades and what it writes stays in the process
that the user started: it is the same code for any number of workers, and so are the requests (ids
and seeds). Only the engines are elsewhere: a :class:`RemoteEngine` puts requests into the queue of
a :class:`Pool`, which leases them to workers, a few at a time, and hands on what a dead one held.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from time import monotonic

from data_gen.workers.pool import (
    BEAT_SECONDS,
    Alive,
    Call,
    Finished,
    Message,
    Model,
    Refused,
    Started,
)
from pav.core.errors import UserError
from pav.engine.gpu_memory import share_gpu
from pav.engine.loop import drive
from pav.engine.processes import work
from pav.engine.vllm import VllmEngine
from pav.policy.inference import Sampled


def serve(
    models: Sequence[Model],
    inbox: SimpleQueue[list[Call]],
    send: Callable[[Message], None],
) -> None:
    """What a worker does: load ``models`` and answer requests until its process ends."""
    try:
        # Here, not where the run is led: that may be a machine without a GPU.
        served = [(m.path, m.dtype) for m in models]
        shared = share_gpu(models[0].config, served, models[0].max_length, say=False)
        engines = [
            VllmEngine(m.path, m.dtype, m.max_length, config=settings)
            for m, settings in zip(models, shared, strict=True)
        ]
        for engine in engines:
            engine.start()
    except UserError as error:
        send(Refused(str(error)))
        return
    send(Started(os.getpid(), socket.gethostname()))
    drive(engines, [partial(_answer, models, engines, inbox, send)], lambda _: None, 1)


async def _answer(
    models: Sequence[Model],
    engines: Sequence[VllmEngine],
    inbox: SimpleQueue[list[Call]],
    send: Callable[[Message], None],
) -> None:
    running: dict[asyncio.Task[Sampled], int] = {}
    finished: list[asyncio.Task[Sampled]] = []
    said = monotonic()
    while True:
        # With nothing to do it blocks: no engine is busy then.
        while not running or not inbox.empty():
            for r in inbox.get():
                task = asyncio.ensure_future(
                    engines[r.model].sample(
                        r.ids,
                        r.sampler,
                        stop_ids=r.stop_ids,
                        max_tokens=r.max_tokens,
                        seed=r.seed,
                        until=models[r.model].until,
                    )
                )
                task.add_done_callback(finished.append)
                running[task] = r.number
        # An engine's step is between two turns of this loop, or none.
        await asyncio.sleep(0)
        if finished:
            send(Finished([(running.pop(t), t.result()) for t in finished]))
            finished.clear()
            said = monotonic()
        elif monotonic() - said > BEAT_SECONDS:
            send(Alive(tuple(engine.in_flight for engine in engines)))
            said = monotonic()


def main(fd: int) -> None:
    """What a worker process runs; ``fd`` is its connection to the process that leads."""
    work(fd, serve)
