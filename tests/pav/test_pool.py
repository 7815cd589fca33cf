"""The queue in front of workers: scripted ones answer, die, hang and come late."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from pav.core.errors import UserError
from pav.core.progress import Reporter
from pav.engine import pool as pools
from pav.engine.pool import DEATHS, Pool, check_workers
from pav.engine.worker import Alive, Died, Finished, Lease, Load, Loaded, Message, Refused, Started


class Named:
    """A job, told by its name; scripted workers do not load it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self) -> Loaded:
        raise AssertionError("is not loaded here")


class Scripted:
    """Workers that answer and die by lot: what a pool makes of that is under test.

    Those that hang say nothing until they are ended; those without room take nothing yet.
    """

    def __init__(self, lot: Random, deaths: int = 0, answers: int = 8) -> None:
        self.lot, self.deaths, self.answers = lot, deaths, answers
        self.hanging: set[int] = set()
        self.hangs_with: Any = None
        self.no_room: set[int] = set()
        self.inbox: dict[int, deque[Load | Lease]] = {}
        self.held: dict[int, deque[tuple[int, Any]]] = {}
        self.job: dict[int, str] = {}
        self.starts: list[int] = []
        self.most_held = 0
        self.answered: Counter[Any] = Counter()
        self.leases: list[list[int]] = []
        self.coming: list[tuple[int, Message]] = []
        self.closed = False

    def start(self, worker: int) -> None:
        self.starts.append(worker)
        self.inbox[worker], self.held[worker] = deque(), deque()

    def send(self, worker: int, message: Load | Lease) -> None:
        self.inbox[worker].append(message)
        if not isinstance(message, Load):
            self.leases.append([number for number, _ in message])

    def receive(self, seconds: float) -> list[tuple[int, Message]]:
        coming, self.coming = self.coming, []
        for worker in self.inbox:
            if worker not in self.no_room:
                coming += [(worker, message) for message in self._turn(worker)]
        return coming

    def _turn(self, worker: int) -> list[Message]:
        if worker in self.hanging:
            return []
        held = self.held[worker]
        if held and self.deaths and self.lot.random() < 0.2:
            self.deaths -= 1
            return [Died("signal SIGKILL")]
        if self.lot.random() < 0.2:
            return []  # it is slow
        said: list[Message] = []
        while self.inbox[worker]:
            message = self.inbox[worker].popleft()
            if isinstance(message, Load):
                assert not held
                self.job[worker] = message.job.name  # type: ignore[attr-defined]
                said += [Alive(), Started(message.number, 100 + worker, "here")]
            else:
                held.extend(message)
        self.most_held = max(self.most_held, len(held))
        if any(content == self.hangs_with for _, content in held):
            self.hanging.add(worker)
            return said
        done = [held.popleft() for _ in range(min(len(held), self.answers))]
        self.answered.update(content for _, content in done)
        # What a worker says twice counts once.
        said += [Finished([(n, (self.job[worker], content)) for n, content in done])] * 2
        return said

    def end(self, worker: int) -> None:
        self.hanging.discard(worker)
        self.inbox[worker].clear()
        self.held[worker].clear()

    def close(self) -> None:
        self.closed = True


def pool_of(transport: Any, workers: int, room: int = 20, lease: int = 2, queues: int = 1) -> Pool:
    return Pool(transport, workers, "items", lambda _: 1, room=room, lease=lease, queues=queues)


def answers(pool: Pool, job: str, count: int) -> list[Any]:
    """What comes back of ``count`` items, the i-th of which is i, over all queues by turns."""
    found: dict[int, Any] = {}
    pool.load(Named(job))
    while not pool.ready:
        pool.step()
    for i in range(count):
        assert i not in found
        keep: Callable[[Any], None] = lambda answer, i=i: found.update({i: answer})  # type: ignore[misc]  # noqa: E731
        pool.submit((job, i), keep, queue=i % len(pool._queues), name=f"item {i}")
    while pool.busy:
        pool.step()
    return [found[i] for i in range(count)]


def all_of(job: str, count: int) -> list[Any]:
    return [(job, (job, i)) for i in range(count)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pool's clock: a step of a minute whenever it is asked."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 60.0
        return now[0]

    monkeypatch.setattr(pools, "monotonic", monotonic)
    return now


@pytest.mark.parametrize("seed", range(10))
def test_every_item_of_every_job_is_answered_once_whoever_dies(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    transport = Scripted(Random(seed), deaths=DEATHS - 1)
    pool = pool_of(transport, 3, queues=2)
    for job, count in (("a", 1), ("b", 200), ("c", 2)):
        assert answers(pool, job, count) == all_of(job, count)
    assert set(transport.answered.values()) == {1}
    died = DEATHS - 1 - transport.deaths
    assert capsys.readouterr().err.count("WARNING: worker ") == died
    assert len(transport.starts) == 3 + died
    pool.close()
    assert transport.closed


def test_worker_holds_no_more_than_it_may_and_leases_are_successive() -> None:
    transport = Scripted(Random(0), answers=3)
    answers(pool_of(transport, 2, room=20, lease=2, queues=2), "a", 200)
    assert transport.most_held == 2 * 20
    assert {b - a for lease in transport.leases for a, b in pairwise(lease)} == {2}
    assert max(map(len, transport.leases)) == 2


def test_worker_that_hangs_is_ended_and_started_again_and_others_get_what_it_held(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pools, "SILENT_SECONDS", 0.05)
    transport = Scripted(Random(0))
    pool = pool_of(transport, 3)
    assert answers(pool, "a", 3) == all_of("a", 3)
    transport.hanging = {1}
    assert answers(pool, "b", 200) == all_of("b", 200)
    assert set(transport.answered.values()) == {1}
    assert transport.starts == [0, 1, 2, 1]
    said = capsys.readouterr().err
    assert "WARNING: worker 1 died (silent for 0 minutes, ended); the " in said
    assert "it starts again (1 of 2 times)" in said
    assert said.count("WARNING") == 1


def test_item_that_hangs_whoever_holds_it_ends_the_run_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pools, "SILENT_SECONDS", 0.05)
    # Far apart: no worker dies three times within ten minutes.
    monkeypatch.setattr(pools, "DEATH_SECONDS", 0.0)
    transport = Scripted(Random(0))
    transport.hangs_with = ("a", 5)
    with pytest.raises(UserError, match=r"^3 workers fell silent, .* over 1 items \(item 5\), at"):
        answers(pool_of(transport, 2, room=1, lease=1), "a", 20)
    assert len(transport.starts) == 4


def test_worker_that_dies_again_and_again_ends_the_run() -> None:
    with pytest.raises(UserError, match=r"worker 0 died 3 times within 10 minutes, at last by sig"):
        answers(pool_of(Scripted(Random(0), deaths=99, answers=0), 1), "a", 20)


def test_what_the_user_can_mend_ends_the_run_at_once() -> None:
    transport = Scripted(Random(0))
    transport.coming.append((0, Refused("vLLM cannot load 'x': no such file")))
    with pytest.raises(UserError, match=r"^worker 0: vLLM cannot load 'x'"):
        answers(pool_of(transport, 1), "a", 20)
    with pytest.raises(UserError, match="workers is 0; give 1 or more"):
        check_workers(0, None)
    with pytest.raises(UserError, match="ray is ' '; give the address of a running cluster"):
        check_workers(1, " ")


def test_worker_that_a_cluster_has_no_room_for_is_not_waited_for_and_joins_later() -> None:
    transport = Scripted(Random(0))
    transport.no_room = {1}
    pool = pool_of(transport, 2)
    for job in "abc":
        assert answers(pool, job, 20) == all_of(job, 20)
    assert pool.placed == 1
    transport.no_room = set()
    # It was sent the first job; what it answers is of the one that is asked.
    assert answers(pool, "d", 200) == all_of("d", 200)
    assert pool.placed == 2
    assert transport.job == {0: "d", 1: "d"}


class Told:
    """One worker whose messages come at the times they are told to, on the pool's clock."""

    def __init__(self, clock: list[float], messages: list[tuple[float, Message]]) -> None:
        self.clock, self.messages = clock, messages
        self.ended: list[int] = []
        self.jobs: list[int] = []

    def start(self, worker: int) -> None:
        pass

    def send(self, worker: int, message: Load | Lease) -> None:
        if isinstance(message, Load):
            self.jobs.append(message.number)

    def receive(self, seconds: float) -> list[tuple[int, Message]]:
        if not self.messages or self.messages[0][0] > self.clock[0]:
            return []
        return [(0, self.messages.pop(0)[1])]

    def end(self, worker: int) -> None:
        self.ended.append(worker)

    def close(self) -> None:
        pass


def test_loading_and_a_long_item_are_not_taken_for_hanging(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    # Hours until it has started, hours until it has loaded, and an hour of engine steps.
    steps: list[tuple[float, Message]] = [(60_000.0 + 300 * i, Alive((70 * i,))) for i in range(12)]
    told = Told(clock, [(20_000.0, Alive()), (40_000.0, Started(0, 1, "here")), *steps,
                        (64_000.0, Finished([(0, "found")]))])  # fmt: skip
    pool = pool_of(told, 1, lease=1)
    pool.load(Named("a"))
    while not pool.ready:
        pool.step()
    said = capsys.readouterr().err
    assert "waiting: workers that still load their models: none of 1 has started\n" in said
    assert "waiting: workers that still load their models: 0\n" in said
    clock[0] = 60_000.0
    kept: list[str] = []
    pool.submit(0, kept.append)
    in_flight = set()
    while pool.busy:
        pool.step()
        in_flight.add(pool.in_flight(0))
    assert kept == ["found"] and not told.ended
    assert {70, 700} < in_flight
    # The same worker does not even take the next job.
    pool.load(Named("b"))
    while not told.ended:
        pool.step()
    assert "worker 0 died (silent for 10 minutes, ended); the 0 items" in capsys.readouterr().err


def test_worker_that_loads_for_hours_takes_the_next_job_when_it_is_done(clock: list[float]) -> None:
    told = Told(clock, [(0.0, Alive()), (40_000.0, Started(0, 1, "here")),
                        (40_100.0, Alive()), (40_200.0, Started(1, 1, "here"))])  # fmt: skip
    pool = pool_of(told, 1)
    pool.load(Named("a"))
    pool.step()
    assert pool.placed == 1
    pool.load(Named("b"))
    while not pool.ready:
        pool.step()
    assert told.jobs == [0, 1] and not told.ended


def test_terminal_shows_a_line_per_worker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    transport = Scripted(Random(0))
    transport.no_room = {1}
    pool = pool_of(transport, 2)
    pool.load(Named("a"))
    with Reporter("rollouts", 8, "solutions") as reporter:
        reporter.update(3, "12 tokens/s", pool.lines)
        while not pool.ready:
            pool.step()
        reporter.update(4, "15 tokens/s", pool.lines)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)  # colours
    for part in (
        "4/8",
        "15 tokens/s",
        "worker 0: 0 items done, 0 tokens/s, 0 held",
        "worker 1: starting",
    ):
        assert part in said
