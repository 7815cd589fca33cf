"""Command ``data_gen.status``: see :mod:`data_gen.inspect.status`."""

from data_gen.inspect.status import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
