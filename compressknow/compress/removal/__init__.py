"""Removal: blocks and neurons left out, so that what all later steps take for the checkpoint is a smaller one."""
