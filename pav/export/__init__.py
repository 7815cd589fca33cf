"""A verifier in other formats: a directory that vLLM serves, PRM, model card, GGUF."""
