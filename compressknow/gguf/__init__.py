"""GGUF files of a checkpoint for llama.cpp, Ollama and LM Studio, by llama.cpp's converter and its quantization."""
