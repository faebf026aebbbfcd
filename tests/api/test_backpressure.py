"""Many readers stall at once: each is cut off separately, and the other readers receive everything."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.api.test_sockets import CHAT, HI, Connection, endless
from tests.support.asgi import events_of
from tests.support.scripted_engine import ScriptedEngine, say, scripted_app
from tests.support.serving import serving
from tgi_asgi.api import sse

NUM_STALLED = 25
MAX_WAITING = 100


async def test_stalled_readers_are_cut_off_each_by_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sse, "MAX_WAITING_EVENTS", MAX_WAITING)
    engine = ScriptedEngine(endless)
    stalled = []
    with caplog.at_level(logging.WARNING, "tgi_asgi"):
        async with serving(scripted_app(engine), send_buffer=8192) as url:
            for _ in range(NUM_STALLED):
                connection = await Connection.to(url, receive_buffer=4096)
                await connection.post(CHAT, {"messages": HI, "stream": True})
                stalled.append(connection)
            async with asyncio.timeout(30):
                while len(engine.channels) < NUM_STALLED:
                    await asyncio.sleep(0.002)
            engine.script = say("a", "b", "c")
            for _ in range(5):
                reader = await Connection.to(url)
                await reader.post(CHAT, {"messages": HI, "stream": True})
                await reader.head()
                body = b""
                while data := await reader.chunk():
                    body += data
                assert events_of(body)[-1] == "[DONE]"
                await reader.close()
            async with asyncio.timeout(30):
                while engine.num_permits < 128:
                    await asyncio.sleep(0.002)
            for connection in stalled:
                connection.writer.transport.abort()
    victims = engine.channels[:NUM_STALLED]
    assert all(channel.is_cancelled for channel in victims)
    assert not any(channel.is_cancelled for channel in engine.channels[NUM_STALLED:])
    cut = [record for record in caplog.records if "stream cut off" in record.getMessage()]
    assert len(cut) == NUM_STALLED
    # A stalled reader costs the data that the kernel has buffered, and at most this many events.
    assert all(f"{MAX_WAITING + 1} tokens behind" in record.getMessage() for record in cut)
