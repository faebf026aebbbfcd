"""An MCP server on standard input and output with one tool, for test_agents.py: `python mcp_server.py`."""

from __future__ import annotations

import json
import sys
from typing import Any

TOOL = {
    "name": "count_fruit",
    "description": "Count the fruit in a file.",
    "inputSchema": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
}


def result_of(method: str, params: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a request."""
    match method:
        case "initialize":
            server = {"name": "fruit", "version": "1"}
            protocol = params["protocolVersion"]
            return {"protocolVersion": protocol, "capabilities": {"tools": {}}, "serverInfo": server}
        case "tools/list":
            return {"tools": [TOOL]}
        case "tools/call":
            return {"content": [{"type": "text", "text": f"7 in {params['arguments']['path']}"}]}
    return {}


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        if "id" in request:  # others are notifications
            result = result_of(request["method"], request.get("params") or {})
            print(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}), flush=True)
