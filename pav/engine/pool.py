"""The one queue in front of engines that are in other processes: leases, deaths, restarts.

The process that the user started leads: it decides what is asked for and keeps every answer. Items
wait in a queue, or one per model. A worker gets a lease, a run of successive items, while it holds
fewer than it may. What a dead worker held goes back to the front, to whoever has room; only the
first answer to an item counts. A worker that holds items says twice a minute that its engines still
step; silence is a death. A worker that died is started again.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time
from typing import Any, Protocol

from pav.core.errors import UserError
from pav.core.files import json_text, replace_file
from pav.engine.loading import EngineConfig
from pav.engine.processes import Processes, placement, visible_devices
from pav.engine.ray import Actors
from pav.engine.worker import Alive, Died, Finished, Job, Lease, Load, Message, Refused, Started

WORKERS = "workers.json"
# A worker that dies so often within so many seconds ends the run; so does an item that so many
# workers held when they fell silent: what hangs one hangs the next one, too.
DEATHS, DEATH_SECONDS = 3, 600.0
# A worker with items is ended when it was silent for so long: a single step of an engine takes
# seconds at most. How long a process takes to start, and to load engines, nobody can say.
SILENT_SECONDS = 600.0
_BEATS = 20
_POLL_SECONDS = 0.2
_NOTE_SECONDS = 10.0
_PATIENCE_SECONDS = 60.0


class Transport(Protocol):
    """How workers are started and reached."""

    def start(self, worker: int) -> None:
        """Start a worker, or one in place of a dead one.

        Raises:
            UserError: if that cannot be done here.
        """

    def send(self, worker: int, message: Load | Lease) -> None:
        """Give a message to a worker, dead or alive, without waiting for it."""

    def receive(self, seconds: float) -> list[tuple[int, Message]]:
        """(worker, message) of what comes within ``seconds``; returns with the first of it."""

    def end(self, worker: int) -> None:
        """End a worker that does not answer; nothing more is received of it."""

    def close(self) -> None:
        """End all workers, within seconds."""


@dataclass
class _Item:
    number: int
    content: Any
    name: str
    answered: Callable[[Any], None]
    silences: int = 0


@dataclass
class _Worker:
    held: list[dict[int, _Item]]
    in_flight: list[int]
    # It has said something since it was started: a cluster may have no room for it yet.
    placed: bool = False
    # It has said something since it was given its job; nothing is expected of one that starts.
    taken: bool = True
    started: Started | None = None
    since: float = 0.0
    heard: float = 0.0
    answers: int = 0
    tokens: int = 0
    tokens_here: int = 0
    deaths: list[float] = field(default_factory=list)

    @property
    def holds(self) -> int:
        return sum(map(len, self.held))

    @property
    def is_silent(self) -> bool:
        """Whether a word of it is overdue."""
        owes = self.holds > 0 or not self.taken
        return owes and monotonic() - self.heard > SILENT_SECONDS

    @property
    def tokens_per_second(self) -> float:
        """Since it loaded its job."""
        return self.tokens_here / max(monotonic() - self.since, 1e-9) if self.started else 0.0


class Pool:
    """Workers behind a queue. Close it at the end; it has none before its first job.

    Args:
        transport: how the workers are started and reached.
        count: workers.
        what: what items are called, in the plural.
        tokens: how many an answer has, for what is shown of the workers.
        queues: items of which one is given to who holds the fewest of the same queue.
        room: items of a queue that a worker holds at most; may be changed between jobs.
        lease: items that a worker gets at a time, and never fewer while more wait.
        note: file that tells how the workers do (see :func:`worker_lines`); None writes none.
    """

    def __init__(
        self,
        transport: Transport,
        count: int,
        what: str,
        tokens: Callable[[Any], int],
        *,
        queues: int = 1,
        room: int = 1,
        lease: int = 1,
        note: Path | None = None,
    ) -> None:
        self.room = room
        self._transport, self._what, self._tokens = transport, what, tokens
        self._lease, self._note = lease, note
        self._noted = 0.0
        self._waited = monotonic()
        self._jobs = 0
        self._job: Load  # the last one
        self._queues: list[deque[_Item]] = [deque() for _ in range(queues)]
        self._next = self._unanswered = 0
        self._workers = [
            _Worker([{} for _ in range(queues)], [0 for _ in range(queues)]) for _ in range(count)
        ]

    @property
    def busy(self) -> bool:
        """Whether items wait for an answer."""
        return self._unanswered > 0

    @property
    def ready(self) -> bool:
        """Whether all workers that have a place have loaded the job, and one at least."""
        placed = [w for w in self._workers if w.placed]
        return bool(placed) and all(w.started for w in placed)

    @property
    def placed(self) -> int:
        """Workers that run: a cluster may have no room for all of them yet."""
        return sum(w.placed for w in self._workers)

    @property
    def lines(self) -> list[str]:
        """A line per worker."""
        return [
            f"worker {i}: {w.answers} {self._what} done, {w.tokens_per_second:.0f} tokens/s, "
            f"{w.holds} held"
            if w.started
            else f"worker {i}: starting"
            for i, w in enumerate(self._workers)
        ]

    def in_flight(self, queue: int) -> int:
        """Tokens that items in work have so far, as far as the workers have said."""
        return sum(w.in_flight[queue] for w in self._workers)

    def load(self, job: Job) -> None:
        """Have every worker load ``job``; items of the job before must all be answered.

        Raises:
            UserError: if workers cannot be started here.
        """
        is_first = self._jobs == 0
        self._job = Load(self._jobs, job, SILENT_SECONDS / _BEATS)
        self._jobs += 1
        self._waited = monotonic()
        if is_first:
            # All start before one is sent anything.
            for number in range(len(self._workers)):
                self._transport.start(number)
        for number, worker in enumerate(self._workers):
            # One that still starts or loads takes the job when it is done with that.
            if is_first or worker.started:
                self._send_job(number)
            worker.started = None

    def _send_job(self, number: int) -> None:
        worker = self._workers[number]
        # That it takes it is expected at once where it has started.
        worker.heard, worker.taken = monotonic(), not worker.placed
        self._transport.send(number, self._job)

    def submit(
        self, content: Any, answered: Callable[[Any], None], *, queue: int = 0, name: str = ""
    ) -> None:
        """Put an item at the end of a queue.

        Args:
            content: what the job's :attr:`~pav.engine.worker.Loaded.answer` is called with.
            answered: called with the answer, once.
            queue: which.
            name: for messages.
        """
        self._queues[queue].append(_Item(self._next, content, name, answered))
        self._next += 1
        self._unanswered += 1

    def step(self) -> None:
        """Lease what waits to who has room; hand on what comes back.

        Raises:
            UserError: if a worker cannot load the job or an item raised one, or if workers die
                again and again.
        """
        for queue in range(len(self._queues)):
            self._give(queue)
        for number, message in self._transport.receive(_POLL_SECONDS):
            worker = self._workers[number]
            worker.heard, worker.taken, worker.placed = monotonic(), True, True
            match message:
                case Started():
                    self._take_in(number, message)
                case Alive():
                    for i, tokens in enumerate(message.tokens):
                        worker.in_flight[i] = tokens
                case Finished():
                    for item, answer in message.answers:
                        self._resolve(worker, item, answer)
                case Refused():
                    raise UserError(f"worker {number}: {message.error}")
                case Died():
                    self._bury(number, message.reason)
        for number, worker in enumerate(self._workers):
            if worker.is_silent:
                self._transport.end(number)
                self._count_silence(number)
                self._bury(number, f"silent for {SILENT_SECONDS / 60:.0f} minutes, ended")
        self._say_who_loads()
        if monotonic() - self._noted > _NOTE_SECONDS:
            self._write_note()

    def _give(self, queue: int) -> None:
        waiting = self._queues[queue]
        ready = [(i, w) for i, w in enumerate(self._workers) if w.started]
        while waiting and ready:
            number, worker = min(ready, key=lambda pair: len(pair[1].held[queue]))
            held = worker.held[queue]
            if len(held) + self._lease > self.room:
                return
            lease = [waiting.popleft() for _ in range(min(self._lease, len(waiting)))]
            if not worker.holds:  # it had nothing to say anything of
                worker.heard = monotonic()
            held.update((item.number, item) for item in lease)
            self._transport.send(number, [(item.number, item.content) for item in lease])

    def _take_in(self, number: int, started: Started) -> None:
        worker = self._workers[number]
        if started.job == self._job.number:
            worker.started, worker.since, worker.tokens_here = started, monotonic(), 0
        else:  # it was at an earlier job, which is over
            self._send_job(number)

    def _resolve(self, worker: _Worker, number: int, answer: Any) -> None:
        for queue, held in enumerate(worker.held):
            item = held.pop(number, None)
            if item is None:
                continue
            tokens = self._tokens(answer)
            worker.answers += 1
            worker.tokens += tokens
            worker.tokens_here += tokens
            worker.in_flight[queue] = max(0, worker.in_flight[queue] - tokens)
            self._unanswered -= 1
            item.answered(answer)

    def _count_silence(self, number: int) -> None:
        held = [item for items in self._workers[number].held for item in items.values()]
        for item in held:
            item.silences += 1
        hung = [item.name for item in held if item.silences >= DEATHS]
        if hung:
            named = ", ".join(filter(None, hung[:3])) + (", ..." if len(hung) > 3 else "")
            raise UserError(
                f"{DEATHS} workers fell silent, one after the other, over {len(hung)} {self._what} "
                f"({named or 'the same ones'}), at last worker {number}. What is written stays and "
                "the same command resumes; look at what the workers said above, at their GPUs, "
                "and whether the task's grader can hang"
            )

    def _bury(self, number: int, reason: str) -> None:
        worker, now = self._workers[number], monotonic()
        lost = worker.holds
        for queue, held in zip(self._queues, worker.held, strict=True):
            queue.extendleft(reversed(held.values()))
            held.clear()
        worker.started, worker.placed, worker.taken = None, False, True
        worker.in_flight = [0 for _ in worker.held]
        worker.deaths.append(now)
        recent = sum(now - at < DEATH_SECONDS for at in worker.deaths)
        if recent >= DEATHS:
            raise UserError(
                f"worker {number} died {recent} times within {DEATH_SECONDS / 60:.0f} minutes, at "
                f"last by {reason}; what it said is above. If memory was short lower workers, "
                "concurrency, engine.kv_gib or engine.max_num_seqs; the same command resumes"
            )
        print(
            f"WARNING: worker {number} died ({reason}); the {lost} {self._what} that it held go to "
            f"whoever is free first, and it starts again ({recent} of {DEATHS - 1} times)",
            file=sys.stderr,
        )
        self._transport.start(number)
        self._send_job(number)

    def _say_who_loads(self) -> None:
        """Say every minute what is waited for: a model may be large, or a cluster have no room."""
        now = monotonic()
        if self.ready:
            self._waited = now
        elif now - self._waited > _PATIENCE_SECONDS:
            self._waited = now
            loading = [str(i) for i, w in enumerate(self._workers) if w.placed and not w.started]
            said = ", ".join(loading) or f"none of {len(self._workers)} has started"
            print(f"waiting: workers that still load their models: {said}", file=sys.stderr)

    def _write_note(self, ended: bool = False) -> None:
        self._noted = monotonic()
        if self._note is None:
            return
        workers = [
            {
                "process": w.started and f"{w.started.process} on {w.started.host}",
                "state": "ended" if ended else "running" if w.started else "starting",
                "held": w.holds,
                "samples": w.answers,
                "tokens": w.tokens,
                "tokens_per_second": round(w.tokens_per_second, 1),
                "deaths": len(w.deaths),
            }
            for w in self._workers
        ]
        waiting = sum(map(len, self._queues))
        content = {"at": round(time()), "waiting": waiting, "workers": workers}
        with suppress(OSError):  # what keeps the answers says so when a disk is full
            replace_file(self._note, json_text(content))

    def close(self) -> None:
        """End all workers; what they had not answered is dropped."""
        self._transport.close()
        self._write_note(ended=True)


def transport(config: EngineConfig, count: int, ray: str | None) -> Transport:
    """``count`` workers on this machine, or on the Ray cluster at ``ray``; none is started yet.

    Raises:
        UserError: if there are too few GPUs.
    """
    if ray is None:
        return Processes(placement(config, count, visible_devices()))
    return Actors(ray, config.tensor_parallel_size)


def check_workers(count: int, ray: str | None) -> None:
    """Refuse a number of workers that is none, and an address that is none.

    Raises:
        UserError: with what to give.
    """
    if count < 1:
        raise UserError(f"workers is {count}; give 1 or more")
    if ray is not None and not ray.strip():
        raise UserError(
            f"ray is {ray!r}; give the address of a running cluster, auto or local, or leave it out"
        )


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
