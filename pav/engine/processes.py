"""Worker processes on this machine: how they start, are reached and end, and what each may use.

The process that the user started leads. A worker ends with its connection, so also with the one
that leads.

What crosses is pickled, which could run code where it is read. Both ends are processes of one user
on one machine, and their connection is a pair of sockets that one inherits from the other: it has
no address, and nobody else can write to it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from subprocess import DEVNULL, Popen, TimeoutExpired

from pav.cli.run import quiet
from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.engine.worker import Died, Inbox, Lease, Load, Message, serve

END_SECONDS = 5.0


class Processes:
    """Workers that are processes on this machine.

    Args:
        environments: of each worker, on top of this process's own.
    """

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        self._environments = [os.environ | dict(change) for change in environments]
        self._running: dict[int, tuple[Popen[bytes], Connection]] = {}

    def start(self, worker: int) -> None:
        """Start a worker in place of one that is gone."""
        here, there = socket.socketpair()
        with there:
            fd = there.fileno()
            process = Popen(
                [sys.executable, "-c", f"from {__name__} import main; main({fd})"],
                stdin=DEVNULL,
                pass_fds=[fd],
                env=self._environments[worker],
                # Ctrl-C is for the process that leads; what it does reaches the others.
                start_new_session=True,
            )
        self._running[worker] = process, Connection(here.detach())

    def send(self, worker: int, message: Load | Lease) -> None:
        """Give a message to a worker, dead or alive, without waiting for it."""
        try:
            self._running[worker][1].send(message)
        except OSError:
            return  # It is dead: that is the next thing to be received of it.

    def receive(self, seconds: float) -> list[tuple[int, Message]]:
        """(worker, message) of what comes within ``seconds``; returns with the first of it.

        :class:`Died` is the last message of a worker.
        """
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

    def end(self, worker: int) -> None:
        """End a worker that does not answer; nothing more is received of it."""
        process, connection = self._running.pop(worker)
        connection.close()
        process.kill()
        with suppress(TimeoutExpired):  # one that hangs in a driver dies when that lets it
            process.wait(END_SECONDS)

    def close(self) -> None:
        """End all workers, within seconds."""
        for process, connection in self._running.values():
            connection.close()
            process.terminate()  # heard only by one that is still starting
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
    import torch

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
    """What a worker process runs.

    Args:
        fd: its connection to the process that leads.
    """
    # The one that leads decides when workers end; a job system signals them all at once.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    quiet()
    os.set_inheritable(fd, False)
    connection = Connection(fd)
    inbox: Inbox = SimpleQueue()
    try:
        inbox.put(connection.recv())  # here, where the modules of the job are imported
    except (EOFError, OSError):
        return  # the one that leads ended before
    # A thread reads, so that neither side ever waits for the other to take what it sends.
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    try:
        serve(inbox, connection.send)
    except OSError:  # the one that leads is gone
        os._exit(0)


def _read(connection: Connection, inbox: Inbox) -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        # Nothing is lost that anybody waits for.
        os._exit(0)
