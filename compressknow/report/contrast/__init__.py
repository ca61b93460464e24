"""What `compare` says of two checkpoints: settings, weights, and what each knows."""
