"""Test-time search with a verifier, and its comparison with best-of-N."""
