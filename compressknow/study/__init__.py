"""Many checkpoints of one model: grids, the cells of a sweep and where they run, and the search."""
