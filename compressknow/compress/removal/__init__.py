"""Removal of blocks and neurons, so that a smaller checkpoint becomes the source of all later steps."""
