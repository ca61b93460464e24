"""compressknow: compress a language model, and know what it forgot."""

__version__ = "0.1.0"
