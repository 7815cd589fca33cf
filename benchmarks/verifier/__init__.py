"""What makes a verifier good, measured on the tape."""
