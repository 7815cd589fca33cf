"""Ctrl-C and SIGTERM: one ends the run within seconds, a second one at once."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Set by the first of them: who waits for a grader need not go on.
interrupted = threading.Event()


def _interrupt() -> None:
    raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises ``KeyboardInterrupt``; the next ends the process.

    A signal that was ignored (a shell's background job ignores SIGINT) stays so. What is written
    line by line (the journal of a label run, the records of a search) is safe against either.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in SIGNALS}

    def first(*_: Any) -> None:
        for s in handled:
            signal.signal(s, second)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise KeyboardInterrupt from None
        interrupted.set()
        # Between two tasks: raised inside one, asyncio would report it once more for that task.
        loop.call_soon_threadsafe(_interrupt)

    def second(number: int, _: Any) -> None:
        os._exit(128 + number)

    interrupted.clear()
    handled = [s for s in SIGNALS if before[s] is not signal.SIG_IGN]
    for s in handled:
        signal.signal(s, first)
    try:
        yield
    finally:
        for s in handled:
            signal.signal(s, before[s])
        interrupted.clear()


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, a signal waits: its handler is called at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in SIGNALS}
    caught: list[tuple[int, Any]] = []
    waiting = [s for s in SIGNALS if callable(before[s])]
    for s in waiting:
        signal.signal(s, lambda *received: caught.append(received))
    try:
        yield
    finally:
        for s in waiting:
            signal.signal(s, before[s])
    for number, frame in caught:
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
