"""``python -m search.compare``."""

from search.compare.command import main

main()
