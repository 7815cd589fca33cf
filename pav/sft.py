"""Command ``pav.sft``: see :mod:`pav.train.sft`."""

from pav.train.sft import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
