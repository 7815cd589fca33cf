"""Online RL of the policy: the outcome and the verifier's advantages as reward (Eq. 5)."""
