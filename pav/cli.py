"""Command lines: a typed config, ``--config x.yaml``, any field overridable, one-line errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

from pav.errors import UserError

Config = TypeVar("Config")


def run(
    function: Callable[[Config], Any],
    config_type: type[Config],
    prog: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse ``argv`` into ``config_type`` and call ``function`` with it.

    A :class:`~pav.errors.UserError` becomes one line on stderr and exit code 2; Ctrl-C exits 130.
    """
    # Stdlib default is block-buffered when output is a file: a night's log must be readable live.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    parser = ArgumentParser(prog=prog, description=config_type.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_class_arguments(config_type, as_group=False)
    args = list(sys.argv[1:] if argv is None else argv)
    # "--task.data x.jsonl" alone means the built-in task that reads such a file.
    if any(a.startswith("--task.data") for a in args) and not any(
        a == "--task" or a.startswith("--task=") for a in args
    ):
        args = ["--task", "pav.tasks.jsonl.Jsonl", *args]
    # A policy is mostly named by its model alone.
    for i, arg in enumerate(args):
        for flag in ("--policy", "--prover"):
            if arg == flag or arg.startswith(f"{flag}="):
                args[i] = f"{flag}.model{arg.removeprefix(flag)}"
    # A user's task module lies where the command is started.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    parsed = parser.instantiate_classes(parser.parse_args(args))
    del parsed["config"]
    try:
        config = config_type(**vars(parsed))
        function(config)
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None
