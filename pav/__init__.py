"""Process advantage verifiers."""

import os

# Before anything imports torch, which reads it once: vLLM on a CPU tells about memory nodes else.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
