"""Studies of many checkpoints of one model: sweeps over a grid, and the search for a size."""
