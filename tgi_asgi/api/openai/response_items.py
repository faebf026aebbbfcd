"""One item of a response's output while it grows: a message, reasoning, or a call."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from tgi_asgi.api.custom_input import CustomInput
from tgi_asgi.api.openai.client_tools import CLIENT_TOOLS, ClientTool
from tgi_asgi.api.openai.logprobs import JsonList
from tgi_asgi.api.openai.tool_search import ToolSearch
from tgi_asgi.api.tools import Tool
from tgi_asgi.text.tools import CallArguments, CallStart, Content, Piece, Reasoning

Fields = dict[str, Any]

# By item type: events' name for the growing field, that field, and the fields that are reported at its end.
_GROWING = {
    "message": ("output_text", "text", ("text", "logprobs")),
    "reasoning": ("reasoning_text", "text", ("text",)),
    "function_call": ("function_call_arguments", "arguments", ("name", "arguments")),
    "custom_tool_call": ("custom_tool_call_input", "input", ("input",)),
}


@dataclass(slots=True)
class OpenItem:
    """An item, and what has come of its text.

    Attributes:
        kind: Its pieces: Content, Reasoning, or CallStart for a call's start and arguments.
        item: The item as clients see it; `fill` writes the text.
        part: Its only part, which has the text; None if the item itself has it.
        custom: Reads the text from the arguments, if it calls a custom tool.
        tool: Type of tool that it calls and is sent as, once the arguments are complete; until then, clients
            do not know of the item.
    """

    kind: type[Piece]
    item: Fields
    part: Fields | None = None
    custom: CustomInput | None = None
    tool: ClientTool | ToolSearch | None = None
    texts: list[str] = field(default_factory=list)  # a string would be copied for each token
    logprobs: JsonList = field(default_factory=JsonList)

    @classmethod
    def of(cls, piece: Piece, tools: Mapping[str, Tool]) -> OpenItem:
        """Return the item that a piece begins; `tools` are those that may be called, by name."""
        if isinstance(piece, CallStart):
            return _call(piece.name, tools.get(piece.name))
        if isinstance(piece, Reasoning):
            item = {"type": "reasoning", "id": new_id("rs"), "summary": [], "content": []}
            part: Fields = {"type": "reasoning_text", "text": ""}
        else:
            item = {"type": "message", "id": new_id("msg"), "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return cls(type(piece), {**item, "status": "in_progress"}, part)

    def takes(self, piece: Piece) -> bool:
        """Return whether a piece continues the item."""
        return type(piece) is (CallArguments if self.kind is CallStart else self.kind)

    @property
    def event(self) -> str:
        """Events' name for the growing field."""
        return _GROWING[self.item["type"]][0]

    @property
    def growing(self) -> Fields:
        """The object with the growing field."""
        return self.item if self.part is None else self.part

    def fill(self) -> None:
        """Write the text that has come so far."""
        text = "".join(self.texts)
        self.growing[_GROWING[self.item["type"]][1]] = text
        for part in self.item.get("summary", ()):
            part["text"] = text
        if self.kind is Content:
            self.growing["logprobs"] = self.logprobs.json()

    def ended(self) -> Fields:
        """Return what the event at the end of the growing field reports."""
        return {name: self.growing[name] for name in _GROWING[self.item["type"]][2]}

    def lacks_end(self) -> bool:
        """Return whether it is a call whose arguments have no end yet."""
        if self.kind is not CallStart:
            return False
        if self.custom is not None:
            return not self.custom.has_ended
        try:
            orjson.loads("".join(self.texts))
        except ValueError:
            return True
        return False


def _call(name: str, tool: Tool | None) -> OpenItem:
    kind, prefix, key, custom = "function_call", "fc", "arguments", None
    if tool is not None and tool.is_custom:
        kind, prefix, key, custom = "custom_tool_call", "ctc", "input", CustomInput()
    item: Fields = {"type": kind, "id": new_id(prefix), "call_id": f"call_{secrets.token_hex(12)}"}
    item |= {"name": name if tool is None else tool.own_name or tool.name, key: ""}
    if tool is not None and tool.namespace is not None:
        item["namespace"] = tool.namespace
    own_type = CLIENT_TOOLS.get(tool.own_type or "") if tool is not None else None
    return OpenItem(CallStart, {**item, "status": "in_progress"}, custom=custom, tool=own_type)


def new_id(prefix: str) -> str:
    """Return an id for an item."""
    return f"{prefix}_{secrets.token_hex(16)}"
