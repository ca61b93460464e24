"""A checkpoint as a GGUF file for llama.cpp, Ollama and LM Studio: its converter and its quantization, put to use."""
