"""Compression by what is seen of the inputs: the text, the run over it, the sums kept, and what is done with them."""
