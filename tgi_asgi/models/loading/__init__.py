"""Weights by canonical name, from safetensors checkpoints and GGUF files."""
