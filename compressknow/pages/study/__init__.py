"""Pages of `sweep` on many checkpoints: the paper's findings, tables and figures, from a study's own data."""
