"""Which prover to choose."""
