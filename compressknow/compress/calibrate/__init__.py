"""Calibration: the text, the walk of the model over it, the sums of what layers read, and what is made of them."""
