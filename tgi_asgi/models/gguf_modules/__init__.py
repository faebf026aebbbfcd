"""GGUF files that the code of `transformers` computes, a module for each group of architectures."""
