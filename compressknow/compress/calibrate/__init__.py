"""Calibration: the text, the model's walk over it, statistics of layer inputs, and the compression that uses them."""
