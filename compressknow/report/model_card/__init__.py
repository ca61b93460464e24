"""The Hub's model card (README.md) of a converted checkpoint, and the figures that a report adds to it."""
