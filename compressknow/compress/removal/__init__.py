"""Removal: blocks and neurons left out, so that all later steps take a smaller checkpoint for the source."""
