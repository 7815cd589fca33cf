"""Reward models of others as scorers."""
