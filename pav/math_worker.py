"""math-verify in a process of its own, under limits on time and memory.

What is parsed was written by a model: ``9^{9^{9^{9}}}`` is a legal answer. math-verify's own time
limits are signals that the C code below sympy does not see, so the process dies and is replaced.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from pav.errors import UserError

# Longer answers are no answers: nothing that a reference holds comes near.
MAX_ANSWER = 1000
# Seconds of processor time for one answer, and the bound on waiting for them: on a busy machine a
# right answer must not be counted wrong because its grader had to queue for a core.
SECONDS = 5.0
WAIT_FACTOR = 20.0
MEMORY = 2 << 30
START_SECONDS = 300.0

# The worker runs this very copy of the package, wherever it was imported from.
_START = (
    "import sys; a = sys.argv[1]; a in sys.path or sys.path.insert(0, a); "
    "import pav.math_worker; pav.math_worker.serve()"
)


class Worker:
    """A process that runs math-verify; it dies when it is over its limits, or with its parent."""

    def __init__(self) -> None:
        # A plain command and JSON lines: multiprocessing would import the user's main module anew
        # (vLLM and all) and read pickles from a process that computes what a model wrote.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(Path(__file__).parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self.receive(START_SECONDS) is None:
            self.stop()
            raise UserError(
                "the process that grades with math-verify does not start; "
                "pip install math-verify, or choose task.grader boxed"
            )

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply, or None if the process died or took longer than ``seconds``."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request, allow_nan=False).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return None
        return self.receive(seconds)

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """One line from the process, or None."""
        assert self.process.stdout is not None
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        # Replies are single short writes: once there is one byte, the line is there.
        if not poll.poll(seconds * 1000):
            return None
        line = self.process.stdout.readline()
        return dict(json.loads(line)) if line.endswith(b"\n") else None

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


# By process id: a forked child must not share its parent's pipe.
workers: dict[int, Worker] = {}
_lock = threading.Lock()


# The same answer comes again and again, also the one that takes all its time.
@lru_cache(maxsize=1 << 16)
def compare(text: str, gold: str) -> dict[str, Any]:
    """What math-verify reads at the end of ``text``, and whether that is the answer ``gold``.

    Compared are expressions only, never the strings that they were read from.

    Returns:
        ``answer``, equal for most answers that are equal (None if nothing was read), and
        ``correct``; empty when the answer took too much time or memory.

    Raises:
        UserError: if the process cannot be started.
    """
    with _lock:
        worker = workers.get(os.getpid())
        if worker is None or worker.process.poll() is not None:
            worker = workers[os.getpid()] = Worker()
        request = {"text": text, "gold": gold, "seconds": SECONDS}
        reply = None
        try:
            reply = worker.ask(request, SECONDS * WAIT_FACTOR)
        finally:  # also on Ctrl-C: a late reply must not answer the next request
            if reply is None:
                _stop()
        return reply or {}


@atexit.register
def _stop() -> None:
    """End the worker of this process, if it has one."""
    worker = workers.pop(os.getpid(), None)
    if worker is not None:
        worker.stop()


def serve() -> None:
    """The worker's loop: one JSON request a line on stdin, one JSON reply a line on stdout."""
    import resource
    import signal

    from math_verify import parse, verify

    # Whatever a library prints must not land among the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ImportError, AttributeError):  # another version of the parser is only slower
        parse_in_two_stages()

    @lru_cache(maxsize=4096)
    def parsed(text: str) -> list[Any]:
        return list(parse(text, parsing_timeout=None, fallback_mode="no_fallback"))

    def judge(text: str, gold: str) -> dict[str, Any]:
        found = parsed(text)
        if not found:
            return {"answer": None, "correct": False}
        wanted = parsed(f"\\boxed{{{gold}}}") if gold else []
        correct = bool(wanted) and bool(
            verify(wanted, found, timeout_seconds=None, allow_set_relation_comp=True)
        )
        answer = canonical(found[0])
        return {"answer": answer if len(answer) <= MAX_ANSWER else None, "correct": correct}

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message, allow_nan=False).encode() + b"\n")
        replies.flush()

    reply({})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # The timer counts processor time and its signal ends the process, also within C code.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            message = judge(request["text"], request["gold"])
        except Exception:  # whatever sympy makes of a model's output, the answer is wrong
            message = {"answer": None, "correct": False}
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply(message)


def canonical(expression: Any) -> str:
    """An answer as text: evaluated, decimals as fractions, ``x=5`` as ``5``."""
    import sympy

    if isinstance(expression, sympy.Eq) and expression.lhs.is_Symbol:
        expression = expression.rhs
    try:
        value = expression.doit()
        if value.has(sympy.Float):
            value = sympy.nsimplify(value, rational=True)
    except Exception:  # what cannot be evaluated stays as it was written
        value = expression
    return str(value)


def parse_in_two_stages() -> None:
    """Make the LaTeX parser below math-verify about four times as fast; its results are the same.

    ANTLR's advice: predict with a parser's local context (SLL) first, and only where that finds a
    syntax error with the whole (LL). What SLL parses, LL parses to the same tree.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2

    class TwoStage(latex2sympy2._Latex2Sympy):
        mode = PredictionMode.SLL

        def create_parser(self, latex: str) -> Any:
            parser = super().create_parser(latex)
            parser._interp.predictionMode = self.mode
            return parser

        def parse(self, latex: str) -> Any:
            try:
                return super().parse(latex)
            except Exception:
                self.mode = PredictionMode.LL
                return super().parse(latex)

    latex2sympy2._Latex2Sympy = TwoStage
