"""``python -m pav.evaluate``."""

from pav.evaluate.command import main

main()
