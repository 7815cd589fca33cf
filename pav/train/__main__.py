"""``python -m pav.train``."""

from pav.train.command import main

main()
