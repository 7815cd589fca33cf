"""A process that answers one request at a time and can be killed when it takes too long.

A plain command with lines on its pipes: multiprocessing would import the user's main module anew
(vLLM and all) and read pickles from a process that computes what a model wrote.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_SECONDS = 300.0
# How often a wait looks whether it has become pointless.
_SLICE = 0.1


class Helper:
    """A process that runs ``function`` of ``module``, which is given what :func:`serve` serves.

    Args:
        module: of this package.
        function: called without arguments.
        quiet: whether its stderr goes nowhere.
    """

    def __init__(self, module: str, function: str, quiet: bool) -> None:
        # The process runs this very copy of the package, wherever it was imported from.
        start = (
            "import sys; a = sys.argv[1]; a in sys.path or sys.path.insert(0, a); "
            f"import {module}; {module}.{function}()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", start, str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            # Ctrl-C is for the process that asks; this one ends with its pipe.
            start_new_session=True,
        )

    def ask(
        self, line: bytes, seconds: float, pointless: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """The reply to a line, or None if the process died or took longer than ``seconds``."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + b"\n")
            self.process.stdin.flush()
        except OSError:
            return None
        return self.receive(seconds, pointless)

    def receive(
        self, seconds: float, pointless: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """One line from the process; None without one, and as soon as it would be pointless."""
        assert self.process.stdout is not None
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        deadline = time.monotonic() + seconds
        while not poll.poll(1000 * max(0.0, min(_SLICE, deadline - time.monotonic()))):
            if pointless() or time.monotonic() >= deadline:
                return None
        # Replies are single short writes: once there is one byte, the line is there.
        line = self.process.stdout.readline()
        return dict(json.loads(line)) if line.endswith(b"\n") else None

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def serve(answer: Callable[[bytes], dict[str, Any]]) -> None:
    """Answer lines on stdin with JSON lines on stdout; begins with an empty reply."""
    # Whatever a library prints must not land among the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    message: dict[str, Any] = {}
    lines = iter(sys.stdin.buffer)
    while True:
        replies.write(json.dumps(message, allow_nan=False).encode() + b"\n")
        replies.flush()
        line = next(lines, None)
        if line is None:
            return
        message = answer(line)
