"""Command ``pav.sft``; its ``--help`` waits for no model library."""

from __future__ import annotations

from pav.cli.run import run
from pav.train.sft_config import SftConfig


def sft(config: SftConfig) -> None:
    """Train a policy (see :func:`pav.train.sft.sft` and :func:`pav.train.rft.rft`)."""
    if config.from_traces is not None:
        from pav.train import rft

        return rft.rft(config)
    from pav.train import sft

    sft.sft(config)


def main() -> None:
    """Entry point of ``pav.sft``."""
    run(sft, SftConfig, "pav.sft")


if __name__ == "__main__":
    main()
