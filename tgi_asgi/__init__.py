"""An inference server for language models that speaks TGI's API and OpenAI's."""

__version__ = "0.1.0"
