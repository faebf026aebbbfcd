"""Documents and search results in Anthropic's messages, as text for the prompt."""

from __future__ import annotations

from typing import Any

from tgi_asgi.api.parse import kind_of, refuse, string_of


def has_text(block: dict[str, Any]) -> bool:
    """Return whether a `document` block is plain text."""
    source = block.get("source")
    return isinstance(source, dict) and source.get("type") in ("text", "content")


def document_text(block: dict[str, Any], path: str) -> str:
    """Return a `document` block as text: its title, its context and its content, an empty line between them.

    Raises:
        InvalidRequest: if it is not plain text; `param` names the field.
    """
    source, where = block.get("source"), f"{path}.source"
    if not isinstance(source, dict):
        refuse(where, f"`{where}` must be an object")
    match source.get("type"):
        case "text":
            text = string_of(source, "data", where)
        case "content":
            text = _content(source.get("content"), f"{where}.content")
        case other:
            what = f"`{where}.type` must be text or content, got {str(other)[:40]!r}"
            refuse(f"{where}.type", f"{what}: this server reads no PDFs and no files", "invalid_value")
    parts = [block.get("title"), block.get("context"), text]
    return "\n\n".join(part for part in parts if isinstance(part, str) and part)


def search_text(block: dict[str, Any], path: str) -> str:
    """Return a `search_result` block as text: its title and source, an empty line, and its content."""
    heading = [string_of(block, "title", path), string_of(block, "source", path)]
    text = _content(block.get("content"), f"{path}.content")
    return "\n\n".join(["\n".join(heading), text])


def _content(content: Any, path: str) -> str:
    """Return a text, or the text of text blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(path, f"`{path}` must be a string or a list of text blocks")
    texts = []
    for j, block in enumerate(content):
        where = f"{path}[{j}]"
        kind_of(block, where, ("text",))
        texts.append(string_of(block, "text", where))
    return "\n".join(texts)
