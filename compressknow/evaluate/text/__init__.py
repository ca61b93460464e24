"""Running text: what a causal model holds of each token of it, chunk by chunk, and how it goes on from it."""
