"""Command ``pav.convert``: see :mod:`pav.export.gguf`."""

from pav.export.gguf import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
