"""Command ``pav.export_prm``: see :mod:`pav.export.prm`."""

from pav.export.prm import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
