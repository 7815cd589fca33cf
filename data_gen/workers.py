"""``data_gen.rollouts --workers N``: engines in processes of their own, behind one queue.

What a label run asks for, in which order, how it grades and what it writes stays in the process
that the user started: it is the same code for any number of workers, and so are the requests (ids
and seeds). Only the engines are elsewhere: a :class:`RemoteEngine` puts requests into the queue of
a :class:`Pool`, which leases them to workers, a few at a time, and hands on what a dead one held.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from subprocess import DEVNULL, Popen, TimeoutExpired

import torch

from data_gen.pool import Call, Died, Finished, Message, Model, Pool, Refused, Started
from pav.cli import quiet
from pav.engine import Engine, EngineConfig, Sampled, drive
from pav.errors import UserError

END_SECONDS = 5.0


def open_pool(models: Sequence[Model], count: int, ray: str | None, note: Path | None) -> Pool:
    """Start ``count`` workers on this machine, or on the Ray cluster at ``ray``.

    Args:
        models: what every worker loads.
        count: workers.
        ray: address of a cluster, or None.
        note: see :class:`~data_gen.pool.Pool`.

    Raises:
        UserError: if there are too few GPUs, no Ray, or no cluster.
    """
    if ray is None:
        return Pool(Processes(models, count), models, count, note)
    from data_gen.ray_workers import Actors

    return Pool(Actors(ray, models), models, count, note)


def serve(
    models: Sequence[Model],
    inbox: SimpleQueue[list[Call]],
    send: Callable[[Message], None],
) -> None:
    """What a worker does: load ``models`` and answer requests until its process ends."""
    try:
        engines = [Engine(m.path, m.dtype, m.max_length, config=m.config) for m in models]
    except UserError as error:
        send(Refused(str(error)))
        return
    send(Started(os.getpid(), socket.gethostname()))
    drive(engines, [partial(_answer, engines, inbox, send)], lambda _: None, 1)


async def _answer(
    engines: Sequence[Engine],
    inbox: SimpleQueue[list[Call]],
    send: Callable[[Message], None],
) -> None:
    running: dict[asyncio.Task[Sampled], int] = {}
    finished: list[asyncio.Task[Sampled]] = []
    while True:
        # With nothing to do it blocks: no engine is busy then.
        while not running or not inbox.empty():
            for r in inbox.get():
                task = asyncio.ensure_future(
                    engines[r.model].sample(
                        r.ids, r.sampler, stop_ids=r.stop_ids, max_tokens=r.max_tokens, seed=r.seed
                    )
                )
                task.add_done_callback(finished.append)
                running[task] = r.number
        # An engine's step is between two turns of this loop, or none.
        await asyncio.sleep(0)
        if finished:
            send(Finished([(running.pop(t), t.result()) for t in finished]))
            finished.clear()


class Processes:
    """Workers that are processes on this machine.

    Args:
        models: what every worker loads.
        count: workers that there will be, numbered from 0.

    Raises:
        UserError: if they need more GPUs than there are.
    """

    def __init__(self, models: Sequence[Model], count: int) -> None:
        self._models = list(models)
        self._environments = [
            os.environ | change for change in placement(models[0].config, count, visible_devices())
        ]
        self._running: dict[int, tuple[Popen[bytes], Connection]] = {}

    def start(self, worker: int) -> None:
        """Start a worker in place of one that is gone."""
        here, there = socket.socketpair()
        with there:
            fd = there.fileno()
            process = Popen(
                [sys.executable, "-c", f"from data_gen.workers import main; main({fd})"],
                stdin=DEVNULL,
                pass_fds=[fd],
                env=self._environments[worker],
                # Ctrl-C is for the process that leads; what it does reaches the others.
                start_new_session=True,
            )
        self._running[worker] = process, Connection(here.detach())
        self._send(worker, self._models)

    def send(self, worker: int, calls: list[Call]) -> None:
        """Give requests to a worker."""
        self._send(worker, calls)

    def _send(self, worker: int, message: list[Call] | list[Model]) -> None:
        try:
            self._running[worker][1].send(message)
        except OSError:
            return  # It is dead: that is the next thing to be received of it.

    def receive(self, seconds: float) -> list[tuple[int, Message]]:
        """(worker, message) of what comes within ``seconds``; returns with the first of it."""
        workers = {connection: worker for worker, (_, connection) in self._running.items()}
        found: list[tuple[int, Message]] = []
        for ready in wait(list(workers), seconds):
            assert isinstance(ready, Connection)
            worker = workers[ready]
            try:
                found.append((worker, ready.recv()))
            except (EOFError, OSError):  # after all that it had sent
                found.append((worker, self._died(worker)))
        if not found:
            # A grandchild may hold a dead worker's connection open.
            gone = [w for w, (p, _) in self._running.items() if p.poll() is not None]
            found = [(worker, self._died(worker)) for worker in gone]
        return found

    def _died(self, worker: int) -> Died:
        process, connection = self._running.pop(worker)
        code = _end(process, connection)
        if code >= 0:
            return Died(f"exit code {code}")
        return Died(f"signal {signal.Signals(-code).name}")

    def close(self) -> None:
        """End all workers, within seconds."""
        for _, connection in self._running.values():
            connection.close()
        while self._running:
            _end(*self._running.popitem()[1])


def _end(process: Popen[bytes], connection: Connection) -> int:
    """Exit code of a process that ends when its connection does."""
    connection.close()
    try:
        return process.wait(END_SECONDS)
    except TimeoutExpired:
        process.kill()
        return process.wait()


def visible_devices() -> list[str]:
    """GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def placement(config: EngineConfig, count: int, devices: Sequence[str]) -> list[dict[str, str]]:
    """Environment of each of ``count`` workers: its share of ``devices``, or of the cores.

    Workers share a GPU only where ``kv_gib`` says how much memory each of them takes.

    Raises:
        UserError: if there are too few devices.
    """
    if not devices:
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * count
    size = config.tensor_parallel_size
    places = len(devices) // size
    if not places or (count > places and config.kv_gib is None):
        raise UserError(
            f"workers is {count} and engine.tensor_parallel_size {size}: that takes {count * size} "
            f"GPUs, and {len(devices)} are visible; lower workers, or set engine.kv_gib so that "
            "workers can share a GPU"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(devices[i % places * size :][:size])}
        for i in range(count)
    ]


def main(fd: int) -> None:
    """What a worker process runs; ``fd`` is its connection to the process that leads."""
    # The one that leads decides when workers end; a job system signals them all at once.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    quiet()
    os.set_inheritable(fd, False)
    connection = Connection(fd)
    try:
        models: list[Model] = connection.recv()
    except (EOFError, OSError):
        return  # the one that leads ended before
    inbox: SimpleQueue[list[Call]] = SimpleQueue()
    # A thread reads, so that neither side ever waits for the other to take what it sends.
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    try:
        serve(models, inbox, connection.send)
    except OSError:  # the one that leads is gone
        os._exit(0)


def _read(connection: Connection, inbox: SimpleQueue[list[Call]]) -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        # Nothing is lost that anybody waits for.
        os._exit(0)
