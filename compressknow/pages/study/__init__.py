"""Pages of a `sweep` of many checkpoints: the paper's findings, tables and figures from the study's own data."""
