"""``python -m search.report``."""

from search.report.command import main

main()
