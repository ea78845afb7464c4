"""`rollout-ft bench`: what our processes cost on this machine, measured while they serve."""
