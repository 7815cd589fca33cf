"""Command ``pav.train``; its ``--help`` waits for no model library."""

from __future__ import annotations

from pav.cli.run import run
from pav.train.config import TrainConfig


def train(config: TrainConfig) -> None:
    """Train a verifier (see :func:`pav.train.command.train`)."""
    from pav.train import command

    command.train(config)


def main() -> None:
    """Entry point of ``pav.train``."""
    run(train, TrainConfig, "pav.train")


if __name__ == "__main__":
    main()
