"""Heads on a trunk: the checkpoint, scores of steps, and the final pick."""
