"""``pav.rl`` in a process that kills itself (SIGKILL) in the middle of a phase of an iteration.

Usage: python rl_killed.py PHASE ITERATION [options of pav.rl]; PHASE is sample, update or save.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from pav.rl import checkpoint, loop, rollout
from pav.rl.__main__ import main


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def plant(phase: str, iteration: int) -> None:
    calls = 0
    if phase == "sample":
        whole = rollout.Actor.trace

        async def trace(self: Any, *given: Any, **named: Any) -> Any:
            nonlocal calls
            found = await whole(self, *given, **named)
            calls += given[2][:2] == ("train", iteration)
            if calls == 3:
                die()
            return found

        setattr(rollout.Actor, "trace", trace)  # noqa: B010
    elif phase == "update":
        step: Callable[..., Any] = loop.update

        def update(*given: Any) -> Any:
            nonlocal calls
            found = step(*given)
            if calls == iteration:
                die()
            calls += 1
            return found

        setattr(loop, "update", update)  # noqa: B010
    else:
        write = checkpoint.write_whole

        def torn(path: Any, fill: Any) -> None:
            nonlocal calls
            calls += 1
            if calls <= iteration:
                write(path, fill)
                return

            def half(stream: Any) -> None:
                stream.write(b"half a checkpoint")
                stream.flush()
                die()

            write(path, half)

        setattr(checkpoint, "write_whole", torn)  # noqa: B010


if __name__ == "__main__":
    plant(sys.argv[1], int(sys.argv[2]))
    sys.argv = ["pav.rl", *sys.argv[3:]]
    main()
