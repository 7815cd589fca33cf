"""How good a verifier is: metrics with intervals, ceilings, first errors, ProcessBench."""
