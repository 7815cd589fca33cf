"""Command ``data_gen.import_labels``: see :mod:`data_gen.importers.command`."""

from data_gen.importers.command import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
