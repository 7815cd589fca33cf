"""What a label run leaves: traces, rollouts and counts, and what training reads of them."""
