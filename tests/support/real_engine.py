"""An engine over a real runner, as the program would serve a model, with three LoRA adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.engine.helpers import Answer, collect, submit
from tests.support.adapters import write_adapter
from tests.support.letters import Letters
from tgi_asgi.engine.engine import Engine
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.load import load
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.settings import Settings
from tgi_asgi.types import Adapter, GenerationRequest

_LIMIT_S = 120  # longest wait for an answer, on a machine that may be busy
_RANKS = (1, 4, 7)
_FUSED = ("qkv", "query_key_value", "c_attn", "gate_up")  # targets whose rows other targets contain as well


@asynccontextmanager
async def serving(
    files: ModelFiles, folder: Path, **settings: Any
) -> AsyncIterator[tuple[Engine, list[Adapter | None]]]:
    """Serve as the program would; yield the engine and [None, *adapters], of three ranks, from `folder`."""
    chosen = Settings(num_threads=2, thread_nice=0, enable_lora=True, **settings)
    found = load(chosen, files)
    assert isinstance(found.runner, HostRunner | CudaRunner) and found.adapters is not None
    shapes = {
        f"base_model.model.{name}": target.shape
        for name, target in found.adapters.layout.targets.items()
        if not any(part in name for part in _FUSED)
    }
    adapters: list[Adapter | None] = [None]
    for rank in _RANKS:
        read = found.adapters.load(write_adapter(folder / f"rank{rank}", shapes, rank, lora_alpha=30))
        adapters.append(Adapter(str(rank), read.digest.hex(), read.weights))
    engine = Engine(found.runner, Letters(found.info.vocab_size), chosen, found.info)
    engine.start()
    try:
        yield engine, adapters
    finally:
        await engine.stop()
        found.runner.close()


async def one_by_one(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Answer]:
    """Send requests one after the other."""
    return [await collect(submit(engine, each), _LIMIT_S) for each in requests]


async def all_at_once(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Answer]:
    """Send all requests at once."""
    return await asyncio.gather(*(collect(submit(engine, each), _LIMIT_S) for each in requests))


def client_view(answer: Answer) -> list[tuple[object, ...]]:
    """Return what a client learns from an answer, except timing: tokens, texts and log-probabilities."""
    assert answer.error is None, answer.error
    events = sorted(answer.events, key=lambda event: event.index)
    return [(event.token_id, event.text, event.logprob, str(event.top)) for event in events]
