"""Who writes solutions: its tokenizer, prompt and fingerprints, and what an engine answers."""
