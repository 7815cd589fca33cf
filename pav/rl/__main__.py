"""Command ``pav.rl``; its ``--help`` waits for no model library."""

from __future__ import annotations

from pav.cli.run import run
from pav.rl.config import RlConfig


def rl(config: RlConfig) -> None:
    """Train a policy (see :func:`pav.rl.command.rl`)."""
    from pav.rl import command

    command.rl(config)


def main() -> None:
    """Entry point of ``pav.rl``."""
    run(rl, RlConfig, "pav.rl")


if __name__ == "__main__":
    main()
