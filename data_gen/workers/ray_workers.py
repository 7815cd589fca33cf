"""``data_gen.rollouts --ray ADDRESS``: the workers of a :class:`~data_gen.workers.pool.Pool` on a
cluster.

A worker is a Ray actor with an engine per model. All are asked for at once; those that the cluster
has no room for yet join the run when it has, so machines may come while it goes on. Models must be
readable under the same path on every machine; labels are written by the process that leads.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Any

from data_gen.workers.pool import Call, Message, Model
from data_gen.workers.worker import serve
from pav.cli.run import quiet
from pav.core.errors import UserError
from pav.engine.processes import Died


class _Worker:
    """An actor; three of its methods run at a time, ``run`` for as long as it lives."""

    def __init__(self) -> None:
        self._inbox: SimpleQueue[list[Call]] = SimpleQueue()
        self._outbox: SimpleQueue[Message] = SimpleQueue()

    def run(self, models: list[Model]) -> None:
        quiet()
        serve(models, self._inbox, self._outbox.put)

    def give(self, calls: list[Call]) -> None:
        self._inbox.put(calls)

    def take(self) -> list[Message]:
        """What it has to say, as soon as it has something."""
        messages = [self._outbox.get()]
        while True:
            try:
                messages.append(self._outbox.get_nowait())
            except Empty:
                return messages


class Actors:
    """Workers that are Ray actors: a CPU core each, or ``tensor_parallel_size`` GPUs.

    Args:
        address: of the cluster (``auto``, ``host:port``), or ``local`` for one on this machine.
        models: what every worker loads.

    Raises:
        UserError: without Ray, or where no cluster answers.
    """

    def __init__(self, address: str, models: Sequence[Model]) -> None:
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
            ray.init(address=address, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"ray is {address!r}: {reason}; give the address of a running cluster, auto, or "
                "local"
            ) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray takes it; ours ends the run in order
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        gpus = models[0].config.tensor_parallel_size if has_gpus else 0
        self._ray = ray
        self._class = ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=3)(_Worker)
        self._models = list(models)
        self._actors: dict[int, Any] = {}
        self._awaited: dict[Any, int] = {}

    def start(self, worker: int) -> None:
        """Start a worker in place of one that is gone, when there is room for it."""
        actor = self._class.remote()
        self._actors[worker] = actor
        for answer in (actor.run.remote(self._models), actor.take.remote()):
            self._awaited[answer] = worker

    def send(self, worker: int, calls: list[Call]) -> None:
        """Give calls to a worker."""
        self._actors[worker].give.remote(calls)

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
        """End a worker that does not answer."""
        self._awaited = {a: w for a, w in self._awaited.items() if w != worker}
        self._ray.kill(self._actors.pop(worker))

    def close(self) -> None:
        """End all workers; a cluster that was there before stays."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        self._awaited.clear()
        self._ray.shutdown()
