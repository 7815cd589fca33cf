"""A search over many problems: engines, records, failures, workers."""
