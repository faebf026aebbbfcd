"""Requests become sequences become steps: the scheduler, the block pool and the one engine coroutine."""

from tgi_asgi.engine.engine import Engine
from tgi_asgi.engine.stats import EngineStats, Histogram

__all__ = ["Engine", "EngineStats", "Histogram"]
