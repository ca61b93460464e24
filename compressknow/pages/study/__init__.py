"""What `sweep` says of many checkpoints: the paper's findings, tables and figures, from a study's own data."""
