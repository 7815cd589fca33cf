"""``--workers N``: whole problems searched in processes with engines of their own.

The process that the user started leads: it decides what is searched, hands out the problems of one
queue and writes every record. A worker loads each engine once, when the first search needs it, and
runs as many problems at a time as one process would. So a run of any number of workers makes the
same requests with the same seeds.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any

from pav.engine import Engine, EngineConfig, drive
from pav.errors import UserError
from pav.policy import Dtype
from pav.processes import Died, Processes, placement, visible_devices, work
from search.records import Record

if TYPE_CHECKING:
    from search.session import Session

# A function of a module, its arguments bound with functools.partial: it crosses to the workers.
Search = Callable[..., Coroutine[Any, Any, Record]]
# What it is given: a problem, and in some searches more.
Given = tuple[Any, ...]

# A worker that dies so often within so many seconds ends the run.
DEATHS, DEATH_SECONDS = 3, 600.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Elsewhere:
    """Stands for an :class:`~pav.engine.Engine` that every worker has.

    What crosses to a worker is what it is made with; what arrives there is the engine.
    """

    model: str
    dtype: Dtype
    max_length: int
    score_ids: list[int]
    config: EngineConfig

    def __reduce__(self) -> tuple[Any, ...]:
        ids = tuple(self.score_ids)
        return _engine, (self.model, self.dtype, self.max_length, ids, self.config)


@cache
def _engine(
    model: str, dtype: Dtype, max_length: int, score_ids: tuple[int, ...], config: EngineConfig
) -> Engine:
    return Engine(model, dtype, max_length, list(score_ids), config)


@dataclass(frozen=True)
class _Job:
    """Leader to worker: a session and a :data:`Search`, pickled; how many problems at a time."""

    pickled: bytes
    concurrency: int


@dataclass(frozen=True)
class _Ask:
    """Worker to leader: engines are loaded; a problem, please. The answer is one, or None."""


@dataclass(frozen=True)
class _Found:
    """Worker to leader: what a search left."""

    record: Record


@dataclass(frozen=True)
class _Refused:
    """Worker to leader: what the user can mend."""

    error: str


@dataclass
class _Worker:
    job: _Job | None = None
    # Has no more problems of its job; asks for none before the next.
    idle: bool = True
    # Has asked, and is not answered before all workers are ready.
    ready: bool = False
    held: dict[str, Given] = field(default_factory=dict)
    found: int = 0
    deaths: list[float] = field(default_factory=list)


def check_workers(count: int) -> None:
    """Refuse a number of workers that is none."""
    if count < 1:
        raise UserError(f"workers is {count}; give 1 or more")


class Workers:
    """Processes that search. Close them at the end; an error closes them, too.

    Args:
        count: how many.
        config: device settings of each engine.

    Raises:
        UserError: if there are too few GPUs.
    """

    def __init__(self, count: int, config: EngineConfig) -> None:
        places = placement(config, count, visible_devices())
        self._processes = Processes(__name__, None, places)
        self._workers = [_Worker() for _ in range(count)]
        self._started = False
        self._job: _Job | None = None
        self._queue: deque[Given] = deque()
        self._keep: Callable[[Record], None] | None = None

    @property
    def lines(self) -> list[str]:
        """A line per worker."""
        return [
            f"worker {i}: {w.found} problems, {len(w.held)} held" if w.ready
            else f"worker {i}: starting"
            for i, w in enumerate(self._workers)
        ]  # fmt: skip

    def open(self, session: Session, search: Search, problems: int, concurrency: int) -> None:
        """Have every worker load what ``search`` needs and they lack, and wait for it.

        Args:
            session: policy, task and engines; ``search`` may hold it, too.
            search: what to run.
            problems: how many there will be; of few, none of the workers takes all.
            concurrency: problems at a time, of each worker.

        Raises:
            UserError: if something cannot be sent or loaded.
        """
        try:
            if type(session.task).__module__ == "__main__":
                raise TypeError("the task is defined in the script that was started")
            pickled = pickle.dumps((session, search))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise UserError(
                f"what is searched cannot be sent to workers ({error}); define the task in a "
                "module, without open files, locks and lambdas in its fields, or use --workers 1"
            ) from error
        share = math.ceil(problems / len(self._workers))
        self._job, self._keep = _Job(pickled, max(1, min(concurrency, share))), None
        for number, worker in enumerate(self._workers):
            worker.ready = False
            if not self._started:
                self._processes.start(number)
            if worker.idle:
                self._give(number)
        self._started = True
        self._turn(lambda: all(w.ready for w in self._workers))

    def run(self, given: Sequence[Given], keep: Callable[[Record], None]) -> None:
        """Search what :meth:`open` prepared for; ``keep`` gets every record as it is found.

        Args:
            given: what every search is called with; the problem comes first.
            keep: called once per problem.

        Raises:
            UserError: if a search raised one, or a worker dies again and again.
        """
        self._queue, self._keep = deque(given), keep
        for number in range(len(self._workers)):
            self._answer(number)
        self._turn(lambda: not self._queue and not any(w.held for w in self._workers))

    def _turn(self, done: Callable[[], bool]) -> None:
        try:
            while not done():
                for number, message in self._processes.receive(_POLL_SECONDS):
                    self._take(number, message)
        except BaseException:
            self.close()
            raise

    def _take(self, number: int, message: _Ask | _Found | _Refused | Died) -> None:
        worker = self._workers[number]
        match message:
            case _Ask():
                worker.ready = worker.job is self._job
                if not worker.ready:  # it was still at an earlier one, which is over
                    self._processes.send(number, None)
                    self._give(number)
                elif self._keep is not None:
                    self._answer(number)
            case _Found():
                if worker.held.pop(message.record.problem_id, None) is not None and self._keep:
                    worker.found += 1
                    self._keep(message.record)
            case _Refused():
                raise UserError(message.error)
            case Died():
                self._bury(number, message.reason)

    def _give(self, number: int) -> None:
        worker = self._workers[number]
        worker.job, worker.idle = self._job, False
        self._processes.send(number, self._job)

    def _answer(self, number: int) -> None:
        """Answer what it asked: the next problem, or that there is none."""
        worker = self._workers[number]
        if self._queue:
            given = self._queue.popleft()
            worker.held[given[0].id] = given
            self._processes.send(number, given)
        else:
            worker.idle = True
            self._processes.send(number, None)

    def _bury(self, number: int, reason: str) -> None:
        worker, now = self._workers[number], monotonic()
        lost = len(worker.held)
        self._queue.extendleft(reversed(worker.held.values()))
        worker.held.clear()
        worker.ready = False
        worker.deaths.append(now)
        recent = sum(now - at < DEATH_SECONDS for at in worker.deaths)
        if recent >= DEATHS:
            raise UserError(
                f"worker {number} died {recent} times within {DEATH_SECONDS / 60:.0f} minutes, at "
                f"last by {reason}; what it said is above. If memory was short lower workers, "
                "concurrency, engine.kv_gib or engine.max_num_seqs; the same command resumes"
            )
        print(
            f"WARNING: worker {number} died ({reason}); the {lost} problems that it held are "
            f"searched again, and it starts again ({recent} of {DEATHS - 1} times)",
            file=sys.stderr,
        )
        self._processes.start(number)
        self._give(number)
        for other, w in enumerate(self._workers):
            if w.idle and self._queue:
                self._give(other)

    def close(self) -> None:
        """End all workers; what they are at is dropped."""
        self._processes.close()


def serve(_: None, inbox: SimpleQueue[Any], send: Callable[[Any], None]) -> None:
    """What a worker does: searches, one job after another, until its process ends."""
    while True:
        job: _Job = inbox.get()
        try:
            session, search = pickle.loads(job.pickled)  # noqa: S301 (from the one that leads)
            served = session.served
            for engine in served:
                engine.reset_prefix_cache()
            asked = _asked(search, inbox, send)
            drive(served, asked, lambda record: send(_Found(record)), job.concurrency)
        except UserError as error:
            send(_Refused(str(error)))
            return


def _asked(
    search: Search, inbox: SimpleQueue[Any], send: Callable[[Any], None]
) -> Iterator[Callable[[], Coroutine[Any, Any, Record]]]:
    """What the leading process hands out. One is asked for ahead, so that none is waited for."""
    send(_Ask())
    while (given := inbox.get()) is not None:
        send(_Ask())
        yield partial(search, *given)


def main(fd: int) -> None:
    """What a worker process runs; ``fd`` is its connection to the process that leads."""
    work(fd, serve)
