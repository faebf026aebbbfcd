"""Turn requests into sequences and steps: the scheduler, the block pool and the engine coroutine."""

from tgi_asgi.engine.engine import Engine
from tgi_asgi.engine.stats import EngineStats, Histogram

__all__ = ["Engine", "EngineStats", "Histogram"]
