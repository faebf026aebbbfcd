"""Texts, documents, search results and results of tools in Anthropic's messages, as text for the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tgi_asgi.api.parse import kind_of, refuse_field, string_of

_RESULT = ("text", "image", "tool_reference", "document", "search_result", "browser_state")


def document_text(block: dict[str, Any], path: str) -> str:
    """Return a `document` block as text: its title, its context and its content, an empty line between them.

    Raises:
        InvalidRequest: if it is not plain text; `param` names the field.
    """
    source, where = block.get("source"), f"{path}.source"
    if not isinstance(source, dict):
        refuse_field(where, "must be an object")
    match source.get("type"):
        case "text":
            text = string_of(source, "data", where)
        case "content":
            text = plain_text(source.get("content"), f"{where}.content")
        case other:
            rule = f"must be text or content, got {str(other)[:40]!r}: this server reads no PDFs and no files"
            refuse_field(f"{where}.type", rule, "invalid_value")
    parts = [block.get("title"), block.get("context"), text]
    return "\n\n".join(part for part in parts if isinstance(part, str) and part)


def search_text(block: dict[str, Any], path: str) -> str:
    """Return a `search_result` block as text: its title and source, an empty line, and its content."""
    heading = [string_of(block, "title", path), string_of(block, "source", path)]
    text = plain_text(block.get("content"), f"{path}.content")
    return "\n\n".join(["\n".join(heading), text])


def plain_text(content: Any, path: str) -> str:
    """Return a text, or the text of text blocks.

    Raises:
        InvalidRequest: if it is anything else; `param` names the field.
    """
    return _joined(content, path, ("text",))


def result_text(content: Any, path: str) -> str:
    """Return the text of a tool's result; blocks that have none, such as images, are named.

    Raises:
        InvalidRequest: if it is neither a text nor a list of such blocks; `param` names the field.
    """
    return _joined(content, path, _RESULT)


def _joined(content: Any, path: str, kinds: Sequence[str]) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse_field(path, "must be a string or a list of text blocks")
    texts = []
    for j, block in enumerate(content):
        where = f"{path}[{j}]"
        match kind_of(block, where, kinds):
            case "text":
                texts.append(string_of(block, "text", where))
            case "tool_reference":
                texts.append(f"[tool: {string_of(block, 'tool_name', where)}]")
            case "document" if _has_text(block):
                texts.append(document_text(block, where))
            case "search_result":
                texts.append(search_text(block, where))
            case kind:
                texts.append(f"[{kind} omitted]")
    return "\n".join(texts)


def _has_text(block: dict[str, Any]) -> bool:
    """Return whether a `document` block is plain text."""
    source = block.get("source")
    return isinstance(source, dict) and source.get("type") in ("text", "content")
