"""A server's signals: it stops in time, drains and reloads."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from tests.support.waiting import LONGEST_S
from tgi_asgi.serve import server as module
from tgi_asgi.serve.server import Server
from tgi_asgi.settings import Settings


class _App:
    """The parts of an app with a model that signals need; its drain does not end."""

    def __init__(self) -> None:
        served = SimpleNamespace(engine=self)
        self.context = SimpleNamespace(served=served, failure=None, is_terminating=False)
        self.calls: asyncio.Queue[str] = asyncio.Queue()

    async def drain(self, timeout_s: float) -> None:
        self.calls.put_nowait(f"drain within {timeout_s} s")
        await asyncio.Event().wait()

    def reload(self) -> None:
        self.calls.put_nowait("reload")


@pytest.fixture
async def app(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[_App]:
    """Yield the app of a server that receives this process's signals but must not end the process."""
    app = _App()
    monkeypatch.setattr(module, "create_app", lambda settings, loader: app)
    monkeypatch.setattr(module, "end_process", lambda *how, is_logged: app.calls.put_nowait(f"end {how}"))
    yield app
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


async def _signal(app: _App, number: signal.Signals) -> None:
    """Send a signal; return once the event loop has handled it."""
    os.kill(os.getpid(), number)
    async with asyncio.timeout(LONGEST_S):
        while app.calls.empty() and not app.context.is_terminating:
            await asyncio.sleep(0)


def _server(**settings: Any) -> Server:
    return Server(Settings(**settings), "http://127.0.0.1:1", loader=lambda *given: pytest.fail("no model"))


def _serve(**settings: Any) -> None:
    server = _server(**settings)
    server.handle_signals(lambda: server._app.calls.put_nowait("certificate"))  # type: ignore[attr-defined]


async def test_a_hangup_reloads_the_app_again_and_again(app: _App) -> None:
    _serve()
    for _ in range(2):
        await _signal(app, signal.SIGHUP)
        assert [app.calls.get_nowait(), app.calls.get_nowait()] == ["reload", "certificate"]
    assert not app.context.is_terminating


async def test_without_a_delay_the_drain_begins_at_once(app: _App) -> None:
    _serve(graceful_termination_timeout=7)
    await _signal(app, signal.SIGTERM)
    assert app.context.is_terminating
    async with asyncio.timeout(LONGEST_S):
        assert await app.calls.get() == "drain within 7 s"


async def test_with_a_delay_the_app_leaves_first_and_drains_later(app: _App) -> None:
    _serve(drain_delay_s=0.2)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await _signal(app, signal.SIGTERM)
    assert app.context.is_terminating
    async with asyncio.timeout(LONGEST_S):
        assert await app.calls.get() == "drain within 90 s"
    assert loop.time() - began_s >= 0.1


async def test_a_person_at_the_terminal_does_not_wait_for_balancers(app: _App) -> None:
    _serve(drain_delay_s=3600)
    await _signal(app, signal.SIGINT)
    async with asyncio.timeout(LONGEST_S):
        assert await app.calls.get() == "drain within 90 s"


async def test_an_interrupt_while_the_model_loads_ends_the_process_without_a_word(
    app: _App, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.context.served = None
    ended = []

    def end(reason: str | None, code: int, *, is_logged: bool) -> NoReturn:
        ended.append((reason, code))
        raise SystemExit

    monkeypatch.setattr(module, "end_process", end)
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(SystemExit):
            _server()._on_signal(number)
    assert ended == [(None, 130), ("stopped while loading", 0)]


async def test_a_second_signal_ends_the_delay_and_the_process(
    app: _App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ECHO_S", 0.0)
    _serve(drain_delay_s=3600)
    await _signal(app, signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(LONGEST_S):
        assert await app.calls.get() == "end ('stopped by a second signal', 143)"
