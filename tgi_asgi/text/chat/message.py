"""Messages and tools in the form that chat templates take: plain dicts, as `transformers` passes them."""

from __future__ import annotations

from typing import Any

# `role`, `content` (a text, None, or a list of parts) and further fields. In `tool_calls`, calls are
# `{"id", "type": "function", "function": {"name", "arguments"}}`.
ChatMessage = dict[str, Any]
ChatTool = dict[str, Any]  # `{"type": "function", "function": {"name", "parameters", ...}}`


def message_text(message: ChatMessage) -> str:
    """Return a message's content as one text, with its parts as lines."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
