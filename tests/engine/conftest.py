"""An engine on the fake runner, stopped and checked when the test ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.support.block_pool import check_pool
from tests.support.fake_runner import FakeRunner, FakeTokenizer, fake_info
from tgi_asgi.engine.engine import Engine
from tgi_asgi.settings import Settings

MakeEngine = Callable[..., Engine]


@pytest.fixture
async def make_engine() -> AsyncIterator[MakeEngine]:
    """Yield a function that starts engines.

    At the end, check that every request ended exactly once and that no step read another sequence's cache.
    """
    engines: list[tuple[Engine, FakeRunner]] = []

    def make(runner: FakeRunner | None = None, *, max_total_tokens: int = 4096, **settings: Any) -> Engine:
        runner = runner or FakeRunner()
        engine = Engine(runner, FakeTokenizer(), Settings(**settings), fake_info(max_total_tokens))
        engines.append((engine, runner))
        engine.start()
        return engine

    yield make
    for engine, runner in engines:
        runner.is_manual = False
        while runner.num_in_flight:
            runner.run_next()
        await engine.stop()
        assert runner.violations == []
        stats = engine.stats
        assert stats.accepted == stats.finished + stats.failed + stats.cancelled
        assert engine.admission.num_taken == 0
        check_pool(engine.scheduler.pool)
        assert engine.scheduler.pool.num_used == 0
        assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0
