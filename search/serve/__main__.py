"""``python -m search.serve``."""

from search.serve.command import main

main()
