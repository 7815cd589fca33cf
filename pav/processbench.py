"""Command ``pav.processbench``: see :mod:`pav.evaluate.processbench`."""

from pav.evaluate.processbench import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
