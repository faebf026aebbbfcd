"""Inference server for language models with TGI's and OpenAI's HTTP APIs."""

__version__ = "0.1.0"
