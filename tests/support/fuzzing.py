"""Properties that every answer to a random request must have."""

from __future__ import annotations

from typing import Any

from tests.support.asgi import Call, request, send
from tests.support.scripted_engine import ScriptedEngine
from tgi_asgi.app import App


async def post_and_check(app: App, engine: ScriptedEngine, path: str, body: Any) -> Call:
    """Post a body; require a complete answer, no server error, and all permits and memory returned."""
    try:
        call = await send(app, request("POST", path, body))
    finally:
        app.context.close()
    assert call.status < 500, call.content
    assert call.is_complete
    assert engine.num_permits == 128
    return call
