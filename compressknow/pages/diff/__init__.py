"""Page of a comparison: two checkpoints in what they are and, with probes, in what they know."""
