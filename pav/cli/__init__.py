"""Command lines: typed settings, one-line errors."""
