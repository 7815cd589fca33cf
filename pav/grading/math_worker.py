"""math-verify in a process of its own, under limits on time and memory.

What is parsed was written by a model: ``9^{9^{9^{9}}}`` is a legal answer. math-verify's own time
limits are signals that the C code below sympy does not see, so the process dies and is replaced.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
from contextlib import suppress
from functools import lru_cache
from typing import Any

from pav.core.errors import UserError
from pav.grading import helper_process
from pav.grading.helper_process import START_SECONDS, Helper

# Longer answers are no answers: nothing that a reference holds comes near.
MAX_ANSWER = 1000
# Seconds of processor time for one answer, and the bound on waiting for them: on a busy machine a
# right answer must not be counted wrong because its grader had to queue for a core.
SECONDS = 5.0
WAIT_FACTOR = 20.0
MEMORY = 2 << 30

# By process id: a forked child must not share its parent's pipe.
workers: dict[int, Helper] = {}
_lock = threading.Lock()


# The same answer comes again and again, also the one that takes all its time.
@lru_cache(maxsize=1 << 16)
def compare(text: str, gold: str, boxed: bool = True) -> dict[str, Any]:
    """What math-verify reads in ``text``, and whether that is the answer ``gold``.

    Compared are expressions only, never the strings that they were read from.

    Args:
        text: ``\\boxed{<formula>}``, or a text that ends with an answer.
        gold: a formula.
        boxed: whether it is the former. A formula that cannot be read is no answer then.

    Returns:
        ``answer``, equal for most answers that are equal (None if nothing was read), and
        ``correct``; empty when the answer took too much time or memory.

    Raises:
        UserError: if the process cannot be started.
    """
    with _lock:
        worker = workers.get(os.getpid())
        if worker is None or worker.process.poll() is not None:
            worker = workers[os.getpid()] = _start()
        request = {"text": text, "gold": gold, "boxed": boxed, "seconds": SECONDS}
        reply = None
        try:
            reply = worker.ask(json.dumps(request, allow_nan=False).encode(), SECONDS * WAIT_FACTOR)
        finally:  # also on Ctrl-C: a late reply must not answer the next request
            if reply is None:
                _stop()
        return reply or {}


def _start() -> Helper:
    worker = Helper("pav.grading.math_worker", "serve", quiet=True)
    if worker.receive(START_SECONDS) is None:
        worker.stop()
        raise UserError(
            "the process that grades with math-verify does not start; "
            "pip install math-verify, or choose task.grader boxed"
        )
    return worker


@atexit.register
def _stop() -> None:
    """End the worker of this process, if it has one."""
    worker = workers.pop(os.getpid(), None)
    if worker is not None:
        worker.stop()


def serve() -> None:
    """What the worker does: one JSON request a line on stdin, one JSON reply a line on stdout."""
    import resource
    import signal

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    from pav.grading.latex import same
    from pav.grading.parser_internals import parse_in_two_stages

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ImportError, AttributeError):  # another version of the parser is only slower
        parse_in_two_stages()

    # Its own way with units drops all that follows the first one; ours are gone by now.
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
    )
    formula = LatexExtractionConfig(normalization_config=spelling)

    @lru_cache(maxsize=4096)
    def parsed(text: str, boxed: bool) -> list[Any]:
        # Numbers outside of formulas are looked for in texts only, and the last match decides:
        # else a number would be taken out of a formula that cannot be read.
        return list(
            parse(
                text,
                [formula] if boxed else [formula, ExprExtractionConfig()],
                fallback_mode="no_fallback",
                extraction_mode="first_match",
                parsing_timeout=None,
            )
        )

    def judge(text: str, gold: str, boxed: bool) -> dict[str, Any]:
        found = parsed(text, boxed)
        if not found:
            return {"answer": None, "correct": False}
        wanted = parsed(f"\\boxed{{{gold}}}", True) if gold else []
        correct = bool(wanted) and same(wanted[0], found[0])
        answer = canonical(found[0])
        return {"answer": answer if len(answer) <= MAX_ANSWER else None, "correct": correct}

    def answer(line: bytes) -> dict[str, Any]:
        request = json.loads(line)
        # The timer counts processor time and its signal ends the process, also within C code.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            return judge(request["text"], request["gold"], request["boxed"])
        except Exception:  # whatever sympy makes of a model's output, the answer is wrong
            return {"answer": None, "correct": False}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    helper_process.serve(answer)


def canonical(expression: Any) -> str:
    """An answer as text: evaluated, decimals as fractions, ``x=5`` as ``5``."""
    import sympy
    from sympy.core.relational import Relational

    def value(part: Any) -> Any:
        # An equation would be evaluated to whether it holds.
        if isinstance(part, Relational):
            return part.func(*map(value, part.args), evaluate=False)
        if isinstance(part, sympy.And | sympy.FiniteSet | sympy.Tuple):
            return part.func(*map(value, part.args))
        try:
            done = part.doit()
            return sympy.nsimplify(done, rational=True) if done.has(sympy.Float) else done
        except Exception:  # what cannot be evaluated stays as it was written
            return part

    if isinstance(expression, sympy.Eq) and expression.lhs.is_Symbol:
        expression = expression.rhs
    return str(value(expression))
