"""Call an ASGI app by hand: the test sees every message and controls every pause."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

Message = MutableMapping[str, Any]
App = Callable[..., Awaitable[None]]


@dataclass
class Call:
    """One request to an app and the messages that the app sent.

    While `gate` is cleared, every `send` of a body blocks, as with a client that does not read.
    """

    scope: dict[str, Any]
    body: list[bytes]
    sent: list[Message] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    got_frame: asyncio.Event = field(default_factory=asyncio.Event)
    num_blocked: int = 0

    async def receive(self) -> Message:
        if self.body:
            part = self.body.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self.body)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not self.gate.is_set():
            self.num_blocked += 1
            await self.gate.wait()
        self.sent.append(message)
        self.got_frame.set()

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def content(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def is_complete(self) -> bool:
        """Whether the response ended exactly once, with its last message."""
        ends = [message["type"] == "http.response.body" and not message["more_body"] for message in self.sent]
        return sum(ends) == 1 and ends[-1]


def request(
    method: str,
    path: str,
    body: Any = b"",
    headers: Mapping[str, str] | None = None,
    *,
    chunks: list[bytes] | None = None,
) -> Call:
    """Make a request without sending it; a body that is not bytes becomes JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    all_headers = {"content-type": "application/json"}
    if chunks is None:
        all_headers["content-length"] = str(len(data))
    all_headers |= headers or {}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.1"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in all_headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    call = Call(scope, [data] if chunks is None else list(chunks))
    call.gate.set()
    return call


async def send(app: App, call: Call, timeout_s: float = 10.0) -> Call:
    """Run a request to its end and return it."""
    async with asyncio.timeout(timeout_s):
        await app(call.scope, call.receive, call.send)
    return call


async def peak_of(app: App, call: Call) -> int:
    """Let an app answer a call; return the most bytes that Python's objects took meanwhile."""
    tracemalloc.start()
    try:
        await send(app, call)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak


def events_of(content: bytes) -> list[Any]:
    """Parse a stream of `data:` events strictly; drop comments and keep `[DONE]` as a string."""
    text = content.decode("utf-8")
    assert text.endswith("\n\n"), text[-50:]
    events = []
    for frame in text.removesuffix("\n\n").split("\n\n"):
        if frame.startswith(":"):
            continue
        assert frame.startswith("data: "), frame
        assert "\n" not in frame, frame
        data = frame.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events
