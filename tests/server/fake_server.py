"""The `tgi-asgi` command with the real engine and a runner without a model, for tests of a server's life.

FAKE_MODEL sets its behaviour: `ok`; `waits:PATH` loads until something opens that FIFO; `missing`, `crash`
and `large` fail to load; `dies` loses the device at the first step; `hangs` never ends its tenth step;
`stuck` never stops; `faulty:SEED` raises, runs out of memory, computes NaN and is slow at random. FAKE_STEP_S
is the duration of a step, FAKE_NUM_BLOCKS the size of the KV cache.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from functools import partial

from tests.support.fake_runner import FakeRunner
from tests.support.scripted_engine import CHATML, toy_info
from tests.support.toy_tokenizer import ToyTokenizer
from tgi_asgi import cli
from tgi_asgi.api.served import Served
from tgi_asgi.engine.engine import Engine
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.runner.plan import DeviceLost, StepPlan
from tgi_asgi.serve import server
from tgi_asgi.settings import Settings
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.types import Progress


def load(settings: Settings, progress: Progress) -> Served:
    """Return an engine without a model, with the behaviour that FAKE_MODEL sets."""
    behaviour, _, path = os.environ.get("FAKE_MODEL", "ok").partition(":")
    progress("reading weights", 1 << 20, 4 << 20)
    if behaviour == "waits":
        with open(path, "rb") as fifo:
            fifo.read()
    if behaviour == "missing":
        raise ModelLoadError("model.gguf: no such file")
    if behaviour == "crash":
        raise RuntimeError("a bug in a loader")
    if behaviour == "large":
        raise MemoryError("std::bad_alloc")
    runner = FakeRunner(
        step_s=float(os.environ.get("FAKE_STEP_S", "0.005")),
        num_blocks=int(os.environ.get("FAKE_NUM_BLOCKS", "256")),
        max_batch_size=settings.max_batch_size,
        keeps_plans=False,
    )
    if behaviour == "dies":
        runner.fault = _lose_device
    if behaviour == "hangs":
        runner.fault = partial(_hang, runner)
    if behaviour == "faulty":
        RandomFaults(runner, int(path))
    max_tokens = settings.max_total_tokens or 4096
    tokenizer, info = ToyTokenizer(), toy_info(max_total_tokens=max_tokens, max_input_tokens=max_tokens - 1)
    engine = Engine(runner, tokenizer, settings, info)
    if behaviour == "stuck":
        server.CLOSE_S = 1.0  # the test waits for it
        engine.stop = asyncio.Event().wait  # type: ignore[method-assign,assignment]
    return Served(engine, tokenizer, ChatTemplate(CHATML, {}), info, engine.stats)  # type: ignore[arg-type]


class RandomFaults:
    """Makes a runner fail at random steps, in every way that the engine promises to survive."""

    def __init__(self, runner: FakeRunner, seed: int) -> None:
        self._runner = runner
        self._rng = random.Random(seed)
        self._step_s = runner.step_s
        runner.fault = self._fault
        runner.is_poisoned = self._is_poisoned

    def _fault(self, plan: StepPlan) -> BaseException | None:
        self._runner.step_s = 0.2 if self._rng.random() < 0.01 else self._step_s
        chance = self._rng.random()
        if chance < 0.03:
            return RuntimeError("a step that raises")
        return MemoryError("a step without memory") if chance < 0.06 else None

    def _is_poisoned(self, tokens: Sequence[int]) -> bool:
        return self._rng.random() < 0.0005


def _hang(runner: FakeRunner, plan: StepPlan) -> BaseException | None:
    runner.is_manual = plan.step_id >= 10
    return None


def _lose_device(plan: StepPlan) -> BaseException:
    return DeviceLost("the device is gone")


if __name__ == "__main__":
    server.run = partial(server.run, loader=load)
    cli.main()
