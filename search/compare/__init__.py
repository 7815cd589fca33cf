"""``search.compare``: methods over budgets, with intervals."""
