"""Graders: what a solution's text gives as its answer, and whether that is the reference's.

What is graded was written by a model and is treated as hostile: every grader takes linear time, and
``math`` (sympy underneath) works in a process of its own under limits on time and memory.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import subprocess
import sys
import threading
from collections import deque
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pav.errors import UserError
from pav.tasks.base import Grade

Grader = Literal["number", "boxed", "exact", "math", "none"]

# Longer answers are no answers: nothing that a reference holds comes near.
MAX_ANSWER = 1000
MAX_DIGITS = 100
# Seconds of processor time for one ``math`` answer, and the bound on waiting for them: on a busy
# machine a right answer must not be counted wrong because its grader had to queue for a core.
MATH_SECONDS = 5.0
MATH_WAIT_FACTOR = 20.0
MATH_MEMORY = 2 << 30
START_SECONDS = 300.0

_NUMBER = re.compile(
    r"((?<![\w)\]}])[-+])?"  # a sign, not an operator
    r"\\?\$?"
    r"([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"
    r"(\.[0-9]+)?"
    r"([eE][-+]?[0-9]+)?"
    r"(\s?/\s?[0-9])?"  # a fraction is no decimal number: never read 1/2 as 1
)
_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-"})
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}")
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|\\(?:left|right|quad|qquad|displaystyle)(?![a-zA-Z])|\s+|\$|~")
_SHORT_FRACTION = re.compile(r"\\frac([0-9])([0-9])")


def grade_text(grader: Grader, text: str, gold: str | None) -> Grade:
    """Grade the text of a solution against ``gold``, a reference answer made by :func:`reference`.

    - ``number``: the first number after the last ``####``; without that mark the number in the last
      ``\\boxed{}``, else the last number of the text. Compared exactly: 18, 18.0 and $18 are equal.
    - ``boxed``: the last balanced ``\\boxed{}``, compared as text after normalisation.
    - ``exact``: the last line, stripped.
    - ``math``: the last ``\\boxed{}`` or, without any, what math-verify finds at the end of the
      text, compared by math-verify. Too long or too large to compute counts as wrong.
    - ``none``: there is nothing to grade.

    ``answer`` is the canonical form, equal for answers that are equal (majority votes count it).
    Never raises on any text.

    Raises:
        UserError: if math-verify, or the process that it runs in, cannot be started.
    """
    if grader == "none":
        return Grade(None, False)
    if grader == "math":
        return _grade_math(text, gold)
    answer = _ANSWER[grader](text)
    return Grade(answer, answer is not None and answer == gold)


def reference(grader: Grader, text: str) -> str | None:
    """The answer in a reference solution, canonical as in :func:`grade_text`; None without one.

    For ``boxed`` and ``math`` a reference without ``\\boxed{}`` is the answer itself; for ``none``
    it is the whole text.
    """
    if grader == "number":
        return number_of(text)
    if grader == "exact":
        return last_line(text)
    if grader == "none":
        return text.strip() or None
    inner = last_boxed(text)
    inner = text.strip() if inner is None else inner.strip()
    if not inner or len(inner) > MAX_ANSWER:
        return None
    return normalise(inner) if grader == "boxed" else inner


def number_of(text: str) -> str | None:
    """The number that ``text`` answers with, canonical (``-1234.5``), or None."""
    text = _FRACTION.sub(r"\1/\2", text.translate(_SIGNS).replace("{,}", ","))
    _, mark, tail = text.rpartition("####")
    if mark:
        return _canonical(_NUMBER.search(tail))
    inner = last_boxed(text)
    numbers = _NUMBER.finditer(text if inner is None else inner)
    return _canonical(next(iter(deque(numbers, maxlen=1)), None))


def _canonical(match: re.Match[str] | None) -> str | None:
    """Plain decimal notation without trailing zeros; None for fractions and monstrous numbers."""
    if match is None:
        return None
    sign, whole, decimals, exponent, fraction = match.groups(default="")
    digits = whole.replace(",", "") + decimals
    if fraction or len(digits) > MAX_DIGITS or len(exponent) > 4:
        return None
    # Digits and exponent are bounded, so this is a string of at most about 1100 characters; string
    # work, not arithmetic, because Decimal rounds to its context's precision.
    plain = format(Decimal(sign + digits + exponent), "f")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    negative = plain.startswith("-")
    plain = plain.lstrip("+-").lstrip("0") or "0"
    plain = "0" + plain if plain.startswith(".") else plain
    return "-" + plain if negative and plain != "0" else plain


def last_boxed(text: str) -> str | None:
    """Content of the ``\\boxed{...}`` that opens last among those that are closed, or None."""
    stack: list[tuple[bool, int]] = []
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{" or token.startswith("\\boxed"):
            stack.append((token != "{", match.end()))
        elif token == "}" and stack:
            boxed, start = stack.pop()
            if boxed and (best is None or start > best[0]):
                best = (start, match.start())
    return None if best is None else text[slice(*best)]


def last_line(text: str) -> str | None:
    """The last line that is not blank, stripped, or None."""
    line = text.strip().rsplit("\n", 1)[-1].strip()
    return line if 0 < len(line) <= MAX_ANSWER else None


def _boxed_answer(text: str) -> str | None:
    inner = last_boxed(text)
    if inner is None or len(inner) > MAX_ANSWER:
        return None
    return normalise(inner) or None


def normalise(latex: str) -> str:
    """A LaTeX answer without what leaves its meaning as it is: spacing, ``\\text``, ``\\left``."""
    text = _TEXT.sub(r"\1", latex.translate(_SIGNS))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("{,}", ",")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\%", "").replace("%", "")
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", _SPACING.sub("", text.replace("\\$", "")))
    text = text.rstrip(".")
    number = _NUMBER.fullmatch(text)
    return (_canonical(number) if number else None) or text


_ANSWER = {"number": number_of, "boxed": _boxed_answer, "exact": last_line}


def _grade_math(text: str, gold: str | None) -> Grade:
    inner = last_boxed(text)
    if inner is not None and len(inner) > MAX_ANSWER:
        return Grade(None, False)
    # Where there is no box, an answer stands at the end.
    question = text[-MAX_ANSWER:] if inner is None else f"\\boxed{{{inner}}}"
    reply = _verify(question, gold or "")
    plain = None if inner is None else normalise(inner) or None
    same = bool(plain and gold and plain == normalise(gold))
    return Grade(reply.get("answer") or plain, bool(reply.get("correct")) or same)


# The worker runs this very copy of the package, wherever it was imported from.
_START = (
    "import sys; a = sys.argv[1]; a in sys.path or sys.path.insert(0, a); "
    "import pav.grading; pav.grading.serve()"
)


class _Worker:
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
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
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
_workers: dict[int, _Worker] = {}
_lock = threading.Lock()


# The same answer comes again and again, also the one that takes all its time.
@lru_cache(maxsize=1 << 16)
def _verify(text: str, gold: str) -> dict[str, Any]:
    """Ask the worker; empty when it ran out of time or memory (a new one is started next time)."""
    with _lock:
        worker = _workers.get(os.getpid())
        if worker is None or worker.process.poll() is not None:
            worker = _workers[os.getpid()] = _Worker()
        request = {"text": text, "gold": gold, "seconds": MATH_SECONDS}
        reply = None
        try:
            reply = worker.ask(request, MATH_SECONDS * MATH_WAIT_FACTOR)
        finally:  # also on Ctrl-C: a late reply must not answer the next request
            if reply is None:
                _stop()
        return reply or {}


@atexit.register
def _stop() -> None:
    """End the worker of this process, if it has one."""
    worker = _workers.pop(os.getpid(), None)
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
    resource.setrlimit(resource.RLIMIT_AS, (MATH_MEMORY, MATH_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    @lru_cache(maxsize=4096)
    def parsed(text: str) -> list[Any]:
        return list(parse(text, parsing_timeout=None))

    def judge(text: str, gold: str) -> dict[str, Any]:
        found = parsed(text)
        if not found:
            return {"answer": None, "correct": False}
        wanted = parsed(f"\\boxed{{{gold}}}") if gold else []
        correct = bool(wanted) and bool(verify(wanted, found, timeout_seconds=None))
        answer = str(found[0])
        return {"answer": answer if len(answer) <= MAX_ANSWER else None, "correct": correct}

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
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
