"""Command ``data_gen.show``: see :mod:`data_gen.inspect.show`."""

from data_gen.inspect.show import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
