"""Page of a comparison of two checkpoints: weights, settings and, with probes, knowledge."""
