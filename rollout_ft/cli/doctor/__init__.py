"""`rollout-ft doctor`: whether a cluster is set up for what is promised on it."""
