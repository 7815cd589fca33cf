"""``--ray ADDRESS``: workers on a Ray cluster.

A worker is a Ray actor. All are asked for at once; those that the cluster has no room for yet join
the run when it has, so machines may come while it goes on. Models and verifiers must be readable
under the same path on every machine; results are written by the process that leads.

The cluster is the user's own. Ray sends everything pickled and lets whoever reaches its ports run
code on all its machines: give the address of no cluster that others can reach.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from queue import Empty, SimpleQueue
from typing import Any

from pav.cli.run import quiet
from pav.core.errors import UserError
from pav.engine.worker import Died, Inbox, Lease, Load, Message, serve


class _Worker:
    """An actor; three of its methods run at a time, ``run`` for as long as it lives."""

    def __init__(self) -> None:
        self._inbox: Inbox = SimpleQueue()
        self._outbox: SimpleQueue[Message] = SimpleQueue()

    def run(self) -> None:
        quiet()
        serve(self._inbox, self._outbox.put)

    def give(self, message: Load | Lease) -> None:
        # In order: beside run and take there is one thread.
        self._inbox.put(message)

    def take(self) -> list[Message]:
        """What it has to say, as soon as it has something."""
        messages = [self._outbox.get()]
        while True:
            try:
                messages.append(self._outbox.get_nowait())
            except Empty:
                return messages


class Actors:
    """Workers that are Ray actors: a CPU core each, or GPUs.

    Args:
        address: of the cluster (``auto``, ``host:port``), or ``local`` for one on this machine. It
            is asked for the first worker.
        gpus: of each worker, where the cluster has any.
    """

    def __init__(self, address: str, gpus: int) -> None:
        self._address, self._gpus = address, gpus
        self._ray: Any = None
        self._class: Any = None
        self._actors: dict[int, Any] = {}
        self._awaited: dict[Any, int] = {}

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise UserError(
                "--ray needs the extra 'ray': pip install 'pav-engine[ray]'; --workers N needs "
                "nothing more, on one machine"
            ) from error
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=self._address, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"ray is {self._address!r}: {reason}; give the address of a running cluster, auto, "
                "or local"
            ) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray takes it; ours ends the run in order
        gpus = self._gpus if ray.cluster_resources().get("GPU", 0) > 0 else 0
        self._ray = ray
        self._class = ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=3)(_Worker)

    def start(self, worker: int) -> None:
        """Start a worker, or one in place of a dead one, when there is room for it.

        Raises:
            UserError: without Ray, or where no cluster answers.
        """
        if self._ray is None:
            self._connect()
        actor = self._class.remote()
        self._actors[worker] = actor
        for answer in (actor.run.remote(), actor.take.remote()):
            self._awaited[answer] = worker

    def send(self, worker: int, message: Load | Lease) -> None:
        """Give a message to a worker."""
        self._actors[worker].give.remote(message)

    def receive(self, seconds: float) -> list[tuple[int, Message]]:
        """(worker, message) of what comes within ``seconds``; returns with the first of it."""
        waiting = list(self._awaited)
        first, rest = self._ray.wait(waiting, timeout=seconds)
        more = self._ray.wait(rest, num_returns=len(rest), timeout=0)[0] if first and rest else []
        found: list[tuple[int, Message]] = []
        for answer in [*first, *more]:
            # Buried below by an answer before this one.
            worker = self._awaited.pop(answer, None)
            if worker is None:
                continue
            try:
                messages: list[Message] | None = self._ray.get(answer)
            except self._ray.exceptions.RayError as error:
                found.append((worker, self._died(worker, error)))
                continue
            if messages is not None:  # else its run has ended; what it said of that is in a take
                found += [(worker, message) for message in messages]
                self._awaited[self._actors[worker].take.remote()] = worker
        return found

    def _died(self, worker: int, error: Exception) -> Died:
        self.end(worker)
        return Died(str(error).strip().splitlines()[-1])

    def end(self, worker: int) -> None:
        """End a worker that does not answer; nothing more is received of it."""
        self._awaited = {a: w for a, w in self._awaited.items() if w != worker}
        self._ray.kill(self._actors.pop(worker))

    def close(self) -> None:
        """End all workers; a cluster that was there before stays."""
        if self._ray is None:
            return
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        self._awaited.clear()
        self._ray.shutdown()
