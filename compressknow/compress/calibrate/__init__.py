"""What methods that look at activations know of them: gathered on a calibration text, layer by layer."""
