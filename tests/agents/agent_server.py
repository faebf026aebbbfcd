"""The `tgi-asgi` command with the model of `player.py` and a context of 64k tokens, one byte each.

Each request is written to the folder RECORD as JSON, with the status of its answer. To see what another
version of a client sends, run `RECORD=/tmp/seen python -m tests.agents.agent_server --port 8080` and connect
it.
"""

from __future__ import annotations

import json
import os
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from tests.agents.player import TEMPLATE, play
from tests.support.scripted_engine import ScriptedEngine, scripted_app, toy_info
from tgi_asgi import cli
from tgi_asgi.app import App
from tgi_asgi.serve import server

CONTEXT = 65_536

_call_app = App.__call__


def load(settings: Any, progress: Any) -> Any:
    """Return an app's state with an engine that plays; load no model."""
    info = toy_info(max_input_tokens=CONTEXT - 1, max_total_tokens=CONTEXT)
    return scripted_app(ScriptedEngine(play), settings, info=info, chat_template=TEMPLATE).context.served


class Recorder:
    """Records an app's requests in `folder`: 0001.json, 0002.json and so on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count(1)

    async def __call__(self, app: App, scope: Any, receive: Any, send: Any) -> None:
        """Call the app (this replaces its `__call__`)."""
        if scope["type"] != "http" or scope["path"] == "/health":
            return await _call_app(app, scope, receive, send)
        body, status = bytearray(), 0

        async def receive_recorded() -> Any:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        number = next(self._numbers)

        def write() -> None:
            query = scope["query_string"].decode()
            record = {
                "request": f"{scope['method']} {scope['path']}" + (f"?{query}" if query else ""),
                "status": status,
                "headers": {name.decode(): value.decode() for name, value in scope["headers"]},
                "body": json.loads(body) if body else None,
            }
            (self._folder / f"{number:04}.json").write_text(json.dumps(record, indent=1))

        async def send_recorded(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                write()  # before the client has its answer
            await send(message)

        await _call_app(app, scope, receive_recorded, send_recorded)


if __name__ == "__main__":
    if folder := os.environ.get("RECORD"):
        recorder = Recorder(Path(folder))

        async def _recorded(app: App, scope: Any, receive: Any, send: Any) -> None:
            await recorder(app, scope, receive, send)

        App.__call__ = _recorded  # type: ignore[method-assign,assignment]
    server.run = partial(server.run, loader=load)
    cli.main()
