"""``--workers N``: whole problems searched in processes with engines of their own.

The process that the user started leads: it decides what is searched, hands out the problems of one
queue and writes every record. A worker loads each engine once, when the first search needs it, and
runs as many problems at a time as one process would. So a run of any number of workers makes the
same requests with the same seeds.

A worker that dies is started again. One that is alive and says nothing is ended and not started
again (what hung may hang the next one, too), and the others search what it held.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.engine.processes import Died, Processes, placement, visible_devices
from search.run.records import Record
from search.run.worker import Alive, Ask, Found, Given, Job, Refused, Search, main

# A worker that dies so often within so many seconds ends the run.
DEATHS, DEATH_SECONDS = 3, 600.0
# A worker with problems says that its engines step, 20 times in so many seconds: a single step
# takes seconds at most. How long a process takes to start, and to load engines, nobody can say.
SILENT_SECONDS = 600.0
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 60.0


@dataclass
class _Worker:
    job: Job | None = None
    # Has no more problems of its job; asks for none before the next.
    idle: bool = True
    # Has asked, and is not answered before all workers are ready.
    ready: bool = False
    # Has said something since it was given its job; nothing more is expected before it is ready.
    taken: bool = True
    heard: float = 0.0
    # It hung, and was ended for good.
    gone: bool = False
    held: dict[str, Given] = field(default_factory=dict)
    found: int = 0
    deaths: list[float] = field(default_factory=list)

    @property
    def silent(self) -> bool:
        """Whether a word of it is overdue."""
        owes = bool(self.held) or not self.taken
        return owes and monotonic() - self.heard > SILENT_SECONDS


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
        self._processes = Processes(main.__module__, None, places)
        self._workers = [_Worker() for _ in range(count)]
        self._started = False
        self._waited = monotonic()
        self._job: Job | None = None
        self._queue: deque[Given] = deque()
        self._keep: Callable[[Record], None] | None = None

    @property
    def lines(self) -> list[str]:
        """A line per worker."""
        return [
            f"worker {i}: hung, ended" if w.gone
            else f"worker {i}: {w.found} problems, {len(w.held)} held" if w.ready
            else f"worker {i}: starting"
            for i, w in enumerate(self._workers)
        ]  # fmt: skip

    def open(self, session: object, search: Search, problems: int, concurrency: int) -> None:
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
            pickled = pickle.dumps((session, search))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise UserError(
                f"what is searched cannot be sent to workers ({error}); define the task in a "
                "module, without open files, locks and lambdas in its fields, or use --workers 1"
            ) from error
        share = math.ceil(problems / len(self._left))
        at_a_time = max(1, min(concurrency, share))
        self._job, self._keep = Job(pickled, at_a_time, SILENT_SECONDS / 20), None
        for number, worker in self._left:
            worker.ready = False
            if not self._started:
                self._start(number)
            elif worker.idle:
                self._give(number)
        self._started = True
        self._waited = monotonic()
        self._turn(lambda: all(w.ready for _, w in self._left))

    def run(self, given: Sequence[Given], keep: Callable[[Record], None]) -> None:
        """Search what :meth:`open` prepared for; ``keep`` gets every record as it is found.

        Args:
            given: what every search is called with; the problem comes first.
            keep: called once per problem.

        Raises:
            UserError: if a search raised one, a worker dies again and again, or all hang.
        """
        self._queue, self._keep = deque(given), keep
        for number, _ in self._left:
            self._answer(number)
        self._turn(lambda: not self._queue and not any(w.held for w in self._workers))

    def _turn(self, done: Callable[[], bool]) -> None:
        try:
            while not done():
                for number, message in self._processes.receive(_POLL_SECONDS):
                    self._take(number, message)
                for number, worker in self._left:
                    if worker.silent:
                        self._give_up(number)
                self._say_who_loads()
        except BaseException:
            self.close()
            raise

    @property
    def _left(self) -> list[tuple[int, _Worker]]:
        """Number and worker of all that did not hang."""
        return [(i, w) for i, w in enumerate(self._workers) if not w.gone]

    def _say_who_loads(self) -> None:
        """Say every minute whom the start of a search waits for: that it hangs cannot be known."""
        if self._keep is not None or monotonic() - self._waited < _PATIENCE_SECONDS:
            return
        self._waited = monotonic()
        loading = ", ".join(str(i) for i, w in self._left if not w.ready)
        print(f"waiting: workers that still load their models: {loading}", file=sys.stderr)

    def _take(self, number: int, message: Ask | Alive | Found | Refused | Died) -> None:
        worker = self._workers[number]
        worker.heard, worker.taken = monotonic(), True
        match message:
            case Ask():
                worker.ready = worker.job is self._job
                if not worker.ready:  # it was still at an earlier one, which is over
                    self._processes.send(number, None)
                    self._give(number)
                elif self._keep is not None:
                    self._answer(number)
            case Alive():
                pass
            case Found():
                if worker.held.pop(message.record.problem_id, None) is not None and self._keep:
                    worker.found += 1
                    self._keep(message.record)
            case Refused():
                raise UserError(message.error)
            case Died():
                self._bury(number, message.reason)

    def _start(self, number: int) -> None:
        """Start its process, and give it the job."""
        self._processes.start(number)
        self._give(number)
        # Nothing is expected of it before it has imported what it needs.
        self._workers[number].taken = True

    def _give(self, number: int) -> None:
        worker = self._workers[number]
        worker.job, worker.idle = self._job, False
        worker.heard, worker.taken = monotonic(), False
        self._processes.send(number, self._job)

    def _answer(self, number: int) -> None:
        """Answer what it asked: the next problem, or that there is none."""
        worker = self._workers[number]
        if self._queue:
            given = self._queue.popleft()
            if not worker.held:  # it had nothing to say anything of
                worker.heard = monotonic()
            worker.held[given[0].id] = given
            self._processes.send(number, given)
        else:
            worker.idle = True
            self._processes.send(number, None)

    def _bury(self, number: int, reason: str) -> None:
        worker, now = self._workers[number], monotonic()
        lost = self._take_back(worker)
        worker.deaths.append(now)
        recent = sum(now - at < DEATH_SECONDS for at in worker.deaths)
        if recent >= DEATHS:
            raise UserError(
                f"worker {number} died {recent} times within {DEATH_SECONDS / 60:.0f} minutes, at "
                f"last by {reason}; what it said is above. If memory was short lower workers, "
                "concurrency, engine.kv_gib or engine.max_num_seqs; the same command resumes"
            )
        print(
            f"WARNING: worker {number} died ({reason}); the {len(lost)} problems that it held are "
            f"searched again, and it starts again ({recent} of {DEATHS - 1} times)",
            file=sys.stderr,
        )
        self._start(number)
        self._call_idle()

    def _give_up(self, number: int) -> None:
        """End a worker that hangs; the others search what it held.

        Raises:
            UserError: if there are no others.
        """
        worker = self._workers[number]
        self._processes.end(number)
        worker.gone = True
        lost = self._take_back(worker)
        said = f"worker {number} was silent for {SILENT_SECONDS:.0f} seconds and is ended"
        if not self._left:
            held = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
            raise UserError(
                f"{said}, and no other worker is left; it held the problems {held or 'none'}. "
                "What is written stays and the same command resumes; look at what the worker said "
                "above, at its GPU, and whether the task's grader can hang"
            )
        print(
            f"WARNING: {said}; the {len(lost)} problems that it held go to the others "
            f"({len(self._left)} of {len(self._workers)} workers are left)",
            file=sys.stderr,
        )
        self._call_idle()

    def _take_back(self, worker: _Worker) -> list[str]:
        """Put what a worker held in front of the queue; ids of these problems."""
        lost = list(worker.held)
        self._queue.extendleft(reversed(worker.held.values()))
        worker.held.clear()
        worker.ready = False
        return lost

    def _call_idle(self) -> None:
        """Have those work again that were told that nothing is left."""
        for number, worker in self._left:
            if worker.idle and self._queue:
                self._give(number)

    def close(self) -> None:
        """End all workers; what they are at is dropped."""
        self._processes.close()
