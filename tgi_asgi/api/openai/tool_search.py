"""The search for further tools that a client runs itself: `{"type": "tool_search", "execution": "client"}`.

The model is shown it as a function with the client's parameters. The client answers a `tool_search_call`
with a `tool_search_output`, whose tools the model is offered from then on. Codex makes the tools of MCP
servers known in this way. A search that OpenAI's servers run is skipped, as all hosted tools are: deferred
tools are offered from the start here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tgi_asgi.api.parse import refuse_field
from tgi_asgi.api.tools import Tool, whole_arguments

Fields = dict[str, Any]

KIND = "tool_search"
CALL, OUTPUT = f"{KIND}_call", f"{KIND}_output"
_DESCRIPTION = "Search for tools that are not listed. Those that are found can be called afterwards."
_PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
_NOTHING = "[no tools found]"


class ToolSearch:
    """What `ClientTool` is for the types of tools whose arguments are fixed."""

    kind = KIND
    prefix = "tsc"

    def tool(self, index: int, given: Fields) -> Tool:
        """Return the function for an entry of `tools`.

        Raises:
            InvalidRequest: if the parameters are not an object.
        """
        parameters, description = given.get("parameters"), given.get("description")
        if not isinstance(parameters, dict | None):
            refuse_field(f"tools[{index}].parameters", "must be an object")
        if not isinstance(description, str):
            description = _DESCRIPTION
        return Tool(index, KIND, description, parameters or _PARAMETERS, own_type=KIND)

    def call(self, arguments: str) -> Fields | None:
        """Return a call's type and arguments as the item has them; None if they are cut off."""
        whole = whole_arguments(arguments)
        return {"type": CALL, "execution": "client", "arguments": whole} if isinstance(whole, dict) else None

    def arguments_of(self, item: Fields, path: str) -> Fields | str:
        """Return the arguments in a call of the history: an object, or JSON in a string.

        Raises:
            InvalidRequest: if they are neither.
        """
        arguments = item.get("arguments")
        if not isinstance(arguments, dict | str):
            refuse_field(f"{path}.arguments", "must be an object")
        return arguments


def is_run_by_client(given: Fields) -> bool:
    """Return whether the client runs the search of an entry of `tools`, or of an item."""
    return given.get("execution") == "client"


def found_in(item: Fields) -> list[Any]:
    """Return the tools in the output of a client's search, as entries of `tools`; none in other items."""
    found = item.get("tools")
    if item.get("type") == OUTPUT and is_run_by_client(item) and isinstance(found, list):
        return found
    return []


def result_text(names: Sequence[str]) -> str:
    """Return what the model is shown of a search that found tools with these names."""
    return "\n".join(f"[tool: {name}]" for name in names) or _NOTHING
