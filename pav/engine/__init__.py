"""Where models run: vLLM, the loop that turns it, and worker processes."""
