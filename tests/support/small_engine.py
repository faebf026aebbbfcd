"""A small runner, and an engine that serves with it: real steps, letters for tokens, no files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from tests.support.kv import plain_limits, plain_size
from tests.support.letters import Letters
from tgi_asgi.engine.engine import Engine
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.models.family import Model
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.ops import KvDtype
from tgi_asgi.runner.kv import CacheSizes
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.settings import Settings

if TYPE_CHECKING:
    from tgi_asgi.runner.cuda import CudaRunner

_DEFAULTS = Settings()


def small_runner(
    model: Model | GenericModel, num_blocks: int, *, dtype: KvDtype = "float32", max_tokens: int = 128,
    max_context: int = 192, **features: Any,
) -> HostRunner:  # fmt: skip
    """Return a runner for eight sequences, with blocks of 16 tokens; `features` as in `HostRunner`."""
    limits = plain_limits(max_sequences=8, max_tokens=max_tokens, max_context=max_context)
    return HostRunner(model, CacheSizes(plain_size(num_blocks, dtype)), limits, **features)


@asynccontextmanager
async def serving_with(
    runner: HostRunner | CudaRunner, vocab_size: int, settings: Settings = _DEFAULTS
) -> AsyncIterator[Engine]:
    """Serve with a runner, and close it; no block may be in use at the end."""
    longest = runner.max_context
    info = ModelInfo("tiny", None, "any", "float32", "cpu", vocab_size, longest - 1, longest, frozenset())
    engine = Engine(runner, Letters(vocab_size), settings, info)
    engine.start()
    try:
        yield engine
        await engine.stop()
        assert engine.scheduler.pool.num_used == 0
        engine.scheduler.pool.check()
    finally:
        runner.close()
