"""An inference server for language models that speaks TGI's API and OpenAI's."""

from __future__ import annotations

__version__ = "0.1.0"
