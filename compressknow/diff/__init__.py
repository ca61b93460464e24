"""The weights of two checkpoints, set side by side."""
