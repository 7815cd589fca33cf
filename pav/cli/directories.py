"""Commands that are about directories: these may be named without an option."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from pav.cli.run import Config, run


def run_on_directories(
    function: Callable[[Config], Any],
    config_type: type[Config],
    prog: str,
    option: str = "labels",
    *,
    many: bool = False,
) -> None:
    """As :func:`pav.cli.run.run`, where ``DIR ...`` in front is short for ``--labels DIR``.

    Args:
        function: see there.
        config_type: see there.
        prog: see there.
        option: what the directory is given as.
        many: whether there may be several.
    """
    args = sys.argv[1:]
    cut = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
    paths, rest = args[:cut], args[cut:]
    if len(paths) > 1 and not many:
        print(f"{prog}: error: give one directory, not {len(paths)}", file=sys.stderr)
        raise SystemExit(2)
    labels = [f"--{option}{'+' * many}={path}" for path in paths]
    try:
        run(function, config_type, prog, [*labels, *rest])
    except BrokenPipeError:
        # "data_gen.show DIR | head": what is left unsaid goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
