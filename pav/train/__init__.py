"""``pav.train`` and ``pav.sft``."""
