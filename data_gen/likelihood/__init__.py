"""Likelihoods of the reference answer, in place of rollouts."""
