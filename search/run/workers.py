"""``--workers N`` and ``--ray``: whole problems searched in processes with engines of their own.

The process that the user started leads: it decides what is searched, hands out the problems of one
queue (:mod:`pav.engine.pool`) and writes every record. A worker loads each engine once, when the
first search needs it, and runs as many problems at a time as one process would. So a run of any
number of workers makes the same requests with the same seeds.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.engine.pool import Pool, transport
from pav.engine.worker import Loaded
from search.run.records import Record

# A function of a module, its arguments bound with functools.partial: it crosses to the workers.
Search = Callable[..., Coroutine[Any, Any, Record]]
# What it is given: a problem, and in some searches more.
Given = tuple[Any, ...]


@dataclass(frozen=True)
class SearchJob:
    """The job of a search's workers: a session and a :data:`Search`, pickled once for all of them.

    They go from the process that leads to its workers, and only there; what comes back are records.
    """

    pickled: bytes

    def load(self) -> Loaded:
        """See :class:`pav.engine.worker.Job`."""
        session, search = pickle.loads(self.pickled)  # noqa: S301 (from the one that leads)
        session.settle_here()
        session.start()
        served = session.served
        for engine in served:
            engine.reset_prefix_cache()

        async def answer(given: Given) -> Record:
            return await search(*given)

        return Loaded(served, answer)


class Workers:
    """Workers that search. Close them at the end; an error closes them, too.

    Args:
        count: how many.
        config: device settings of each engine.
        ray: address of the Ray cluster that they run on; None for this machine.

    Raises:
        UserError: if there are too few GPUs.
    """

    def __init__(self, count: int, config: EngineConfig, ray: str | None = None) -> None:
        self.is_elsewhere = ray is not None
        reached = transport(config, count, ray)
        self._pool = Pool(reached, count, "problems", lambda record: record.policy_tokens)

    @property
    def lines(self) -> list[str]:
        """A line per worker."""
        return self._pool.lines

    def open(self, session: object, search: Search) -> None:
        """Have every worker load what ``search`` needs and they lack, and wait for it.

        Workers that a cluster has no room for yet are not waited for.

        Args:
            session: policy, task and engines; ``search`` may hold it, too.
            search: what to run.

        Raises:
            UserError: if something cannot be sent or loaded.
        """
        try:
            job = SearchJob(pickle.dumps((session, search)))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise UserError(
                f"what is searched cannot be sent to workers ({error}); define the task in a "
                "module, without open files, locks and lambdas in its fields, or use --workers 1 "
                "without --ray"
            ) from error
        try:
            self._pool.load(job)
            while not self._pool.ready:
                self._pool.step()
        except BaseException:
            self.close()
            raise

    def run(self, given: Sequence[Given], concurrency: int, keep: Callable[[Record], None]) -> None:
        """Search what :meth:`open` prepared for; ``keep`` gets every record as it is found.

        Args:
            given: what every search is called with; the problem comes first.
            concurrency: problems at a time, of each worker; of few, none of the workers takes all.
            keep: called once per problem.

        Raises:
            UserError: if a search raised one, or workers die or hang again and again.
        """
        share = math.ceil(len(given) / self._pool.placed)
        self._pool.room = max(1, min(concurrency, share))
        try:
            for one in given:
                self._pool.submit(one, keep, name=one[0].id)
            while self._pool.busy:
                self._pool.step()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all workers; what they are at is dropped."""
        self._pool.close()
