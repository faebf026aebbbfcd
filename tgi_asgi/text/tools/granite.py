"""IBM Granite 3: `<|tool_call|>` before a list of calls."""

from __future__ import annotations

from tgi_asgi.text.tools.mistral import MistralFormat


class GraniteFormat(MistralFormat):
    """`<|tool_call|>[{"name": "f", "arguments": {"a": 1}}, ...]`."""

    name = "granite"
    marker = "<|tool_call|>"
    openers = ("<tool_call>",)
    markers = (marker,)
