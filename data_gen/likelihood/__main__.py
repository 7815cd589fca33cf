"""``python -m data_gen.likelihood``."""

from data_gen.likelihood.command import main

main()
