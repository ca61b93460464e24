"""llama.cpp in this process: GGUF files run in its own kernels, read by its own tokenizer."""
