"""Monte-Carlo labels: seed rollouts, prefixes, rollouts from every prefix."""
