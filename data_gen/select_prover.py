"""Command ``data_gen.select_prover``: see :mod:`data_gen.provers.command`."""

from data_gen.provers.command import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
