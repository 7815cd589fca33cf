"""Solutions and labels that others made."""
