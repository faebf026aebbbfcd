"""`100 Continue` under hypercorn, sent when the app asks for the body.

Used only by `body_chunks.py`. hypercorn would send it before the app has seen the request, so that a client
that asks first would upload a body that is too large, or is not wanted for another reason (RFC 9110, 10.1.1).
"""

from __future__ import annotations

from typing import Any

import h11
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import AppWrapper

from tgi_asgi.api.exchange import AWAITS_CONTINUE


def continuing(app: AppWrapper, protocol: H11Protocol) -> AppWrapper:
    """Return the app; if the client waits for a 100, one whose first `receive` sends it."""
    connection = protocol.connection
    if not isinstance(connection, h11.Connection) or not connection.client_is_waiting_for_100_continue:
        return app

    def is_awaited() -> bool:
        return connection.client_is_waiting_for_100_continue  # no longer, if the body came without it

    async def run(scope: Any, receive: Any, send: Any, sync_spawn: Any, call_soon: Any) -> None:
        async def receive_more() -> Any:
            if is_awaited():
                headers = protocol.config.response_headers("h11")
                await protocol._send_h11_event(h11.InformationalResponse(status_code=100, headers=headers))
            return await receive()

        scope["extensions"][AWAITS_CONTINUE] = is_awaited
        await app(scope, receive_more, send, sync_spawn, call_soon)

    return run
