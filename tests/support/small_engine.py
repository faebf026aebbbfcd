"""A small runner, and an engine that serves with it: real steps, letters for tokens, no files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from tests.support.block_pool import check_pool
from tests.support.kv import plain_limits, plain_size
from tests.support.letters import Letters
from tgi_asgi.engine.engine import Engine
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.models.family import Model
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.ops import KvDtype
from tgi_asgi.runner.kv import CacheSizes
from tgi_asgi.runner.plan import StepPlan, StepResult
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.settings import Settings

if TYPE_CHECKING:
    from tgi_asgi.runner.cuda import CudaRunner

_DEFAULTS = Settings()
_Runner = TypeVar("_Runner", bound=HostRunner)


class NotingRunner(HostRunner):
    """A runner that notes the plans of the steps that go through Python.

    Attributes:
        plans: Those plans.
        forbids_python: Whether such steps fail.
    """

    def __init__(self, *args: Any, **features: Any) -> None:
        self.plans: list[StepPlan] = []
        self.forbids_python = False
        super().__init__(*args, **features)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a step, as described in `HostRunner.run`."""
        assert not self.forbids_python, "this step went through Python"
        self.plans.append(plan)
        return super().run(plan)


def small_runner(model: Model | GenericModel, num_blocks: int, **options: Any) -> HostRunner:
    """Return a runner for eight sequences, with blocks of 16 tokens; `options` as in `_small`."""
    return _small(HostRunner, model, num_blocks, **options)


def noting_runner(model: Model | GenericModel, num_blocks: int, **options: Any) -> NotingRunner:
    """Return a small runner that notes plans."""
    return _small(NotingRunner, model, num_blocks, **options)


def _small(
    kind: type[_Runner], model: Model | GenericModel, num_blocks: int, *, dtype: KvDtype = "float32",
    max_tokens: int = 128, max_context: int = 192, **features: Any,
) -> _Runner:  # fmt: skip
    """Return a runner; `features` as in `HostRunner`."""
    limits = plain_limits(max_sequences=8, max_tokens=max_tokens, max_context=max_context)
    return kind(model, CacheSizes(plain_size(num_blocks, dtype)), limits, **features)


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
        check_pool(engine.scheduler.pool)
    finally:
        runner.close()
