"""The page of a comparison: two checkpoints in what they are and, where asked, in what they know."""
