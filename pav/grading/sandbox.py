"""A task's grader, whatever it does: what it raises, and what it never answers, counts as wrong.

A grader of the package runs in this process: its time is bounded. A grader of the user's runs in a
process of its own, which is killed when it is over ``grade_timeout``: a thread cannot be, and one
in a regular expression would hold everything else.
"""

from __future__ import annotations

import asyncio
import base64
import io
import pickle
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pav.core.errors import UserError
from pav.core.printable import one_line, printable
from pav.core.signals import interrupted
from pav.grading import helper_process
from pav.grading.helper_process import START_SECONDS, Helper
from pav.tasks.base import Grade, Problem, Task

WRONG = Grade(None, False)
# A grader that fails this often, and for this share of the answers, ends a run.
MIN_ERRORS, MAX_SHARE = 10, 0.05
NAMED = 3
DEFAULT_TIMEOUT = 10.0
GRADER_LOG = "grader_errors.log"


class GraderFailed(UserError):
    """The grader failed for too many answers. What was graded before is safe."""


@dataclass
class GuardedGrader:
    """Grades with a task's grader. Use as a context manager; threads may share it.

    Attributes:
        task: its grader.
        log: where tracebacks are added; None for stderr.
        timeout: seconds for one answer, for graders of users; None for no limit.
        stops: whether too many failures raise.
        graded: answers so far.
        errors: how many of them the grader raised for, or did not answer for in time.
    """

    task: Task
    log: Path | None = None
    timeout: float | None = DEFAULT_TIMEOUT
    stops: bool = True
    graded: int = 0
    errors: int = 0
    _idle: list[Helper] = field(default_factory=list)
    _in_process: bool = False

    def __post_init__(self) -> None:
        check_timeout(self.timeout)
        self._in_process = self.timeout is None or _is_ours(self.task)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_idle": []}  # another process has its own

    def __enter__(self) -> GuardedGrader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End its processes."""
        while self._idle:
            self._idle.pop().stop()

    def grade(self, text: str, problem: Problem) -> Grade:
        """What the task's grader says; wrong where it raises or takes too long.

        Raises:
            GraderFailed: if that happens too often.
            UserError: what the grader itself raises as something that the user can mend.
        """
        self.graded += 1
        try:
            if self._in_process:
                return _checked(self.task.grade(text, problem))
            return self._ask(text, problem)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            self._failed(text, problem, error)
            return WRONG

    def _ask(self, text: str, problem: Problem) -> Grade:
        helper = self._helper()
        if helper is None:
            return _checked(self.task.grade(text, problem))
        assert self.timeout is not None
        line = base64.b64encode(pickle.dumps((text, problem)))
        reply = None
        try:
            reply = helper.ask(line, self.timeout, interrupted.is_set)
        finally:  # also on Ctrl-C: a late reply must not answer the next request
            if reply is None:
                helper.stop()
        if reply is None:
            if interrupted.is_set():
                raise asyncio.CancelledError
            if (code := helper.process.returncode) not in (-9, None):
                raise RuntimeError(f"the grader ended its process (exit code {code})")
            raise TimeoutError(f"no grade within {self.timeout:g} s (--grade_timeout)")
        self._idle.append(helper)
        if "raised" in reply:
            raise _Raised(reply["raised"], reply["traceback"])
        return Grade(reply["answer"], reply["correct"])

    def _helper(self) -> Helper | None:
        """A process with the task; None if the task cannot be had in one."""
        with suppress(IndexError):
            return self._idle.pop()
        try:
            sent = base64.b64encode(pickle.dumps((sys.path, self.timeout)))
            task = base64.b64encode(pickle.dumps(self.task))
        except Exception as error:
            self._without_limit(f"it cannot be sent to one: {error}")
            return None
        helper = Helper("pav.grading.sandbox", "serve", quiet=False)
        ready = helper.receive(START_SECONDS) is not None
        reply = helper.ask(sent + b" " + task, START_SECONDS) if ready else None
        if reply is None or "raised" in reply:
            helper.stop()
            self._without_limit(reply["raised"] if reply else "none starts")
            return None
        return helper

    def _without_limit(self, why: str) -> None:
        _warn(
            f"the grader of task {self.task.name!r} runs without a time limit: it needs a process "
            f"of its own, and {why}. A task that can be imported from a file has no such trouble"
        )
        self._in_process = True

    def _failed(self, text: str, problem: Problem, error: Exception | SystemExit) -> None:
        self.errors += 1
        said = str(error) if isinstance(error, _Raised) else f"{type(error).__name__}: {error}"
        where = ""
        if self.log is not None or self.errors <= NAMED:
            where = log_error(self.log, f"grading problem {problem.id}, text {text!r}", error)
        if self.errors <= NAMED:
            shown = text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"
            _warn(
                f"the grader failed for an answer to problem {problem.id}, which counts as wrong: "
                f"{' '.join(said.split())[:300]}; the text: {shown!r}; {where}"
            )
        if self.stops and self.errors >= MIN_ERRORS and self.errors > MAX_SHARE * self.graded:
            raise GraderFailed(
                f"the grader of task {self.task.name!r} failed for {self.errors} of {self.graded} "
                f"answers, the last time with {' '.join(said.split())[:200]}; mend it"
                + f" ({where})"
                * bool(where)
            )

    @property
    def summary(self) -> str:
        """What was wrong, in a line; empty if nothing was."""
        if not self.errors:
            return ""
        where = "" if self.log is None else f"; tracebacks: {self.log}"
        return (
            f"the grader failed for {self.errors} of {self.graded} answers, which count as wrong"
            f"{where}"
        )


class _Raised(Exception):
    """What a grader raised in its process; ``trace`` is the traceback there."""

    def __init__(self, said: str, trace: str) -> None:
        super().__init__(said)
        self.trace = trace


@contextmanager
def guarded(task: Task, log: Path | None, timeout: float | None) -> Iterator[GuardedGrader]:
    """A grader whose failures are summed up at the end."""
    with GuardedGrader(task, log, timeout) as grader:
        try:
            yield grader
        finally:
            if grader.errors:
                _warn(grader.summary)


def check_timeout(timeout: float | None) -> None:
    """Refuse a time limit that is none.

    Raises:
        UserError: if it is not above 0.
    """
    if timeout is not None and not timeout > 0:
        raise UserError(
            f"grade_timeout is {timeout}; give seconds above 0, or null for no time limit"
        )


def log_error(log: Path | None, what: str, error: BaseException) -> str:
    """Add a traceback to a log file; says where it is."""
    trace = (
        error.trace if isinstance(error, _Raised) else "".join(traceback.format_exception(error))
    )
    if log is None:
        print(printable(f"{what}\n{trace}"), file=sys.stderr)
        return "the traceback is above"
    try:
        with log.open("a", errors="backslashreplace") as stream:
            stream.write(f"{what}\n{trace}\n")
    except OSError as problem:
        return f"no traceback: {str(log)!r} cannot be written ({problem.strerror})"
    return f"traceback: {log}"


def _is_ours(task: Task) -> bool:
    grade = type(task).grade
    return grade.__module__.startswith("pav.tasks.")


def _checked(grade: Any) -> Grade:
    """A grade of the types that records hold."""
    if not isinstance(grade, Grade):
        raise TypeError(f"grade() returned {grade!r}, which is no Grade")
    if not isinstance(grade.answer, str | None):
        raise TypeError(f"the answer is {grade.answer!r}; it must be text or None")
    return Grade(grade.answer, bool(grade.correct))


def _warn(message: str) -> None:
    print(f"WARNING: {one_line(message)}", file=sys.stderr)


def serve() -> None:
    """What the process of a user's grader does: see :class:`GuardedGrader`."""
    import signal

    task: list[Task] = []
    limit: list[float] = []

    def answer(line: bytes) -> dict[str, Any]:
        try:
            if not task:
                head, body = line.split()
                path, seconds = pickle.loads(base64.b64decode(head))  # noqa: S301 (our own parent)
                sys.path[:] = path
                task.append(pickle.loads(base64.b64decode(body)))  # noqa: S301
                limit.append(seconds)
                return {}
            text, problem = pickle.loads(base64.b64decode(line))  # noqa: S301
            # If nobody is left to kill it.
            signal.setitimer(signal.ITIMER_REAL, 2 * limit[0] + 5)
            grade = _checked(task[0].grade(text, problem))
            return {"answer": grade.answer, "correct": grade.correct}
        except (Exception, SystemExit) as error:
            trace = io.StringIO()
            traceback.print_exc(file=trace)
            return {"raised": f"{type(error).__name__}: {error}", "traceback": trace.getvalue()}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    helper_process.serve(answer)
