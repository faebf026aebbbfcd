"""An engine that plays a script instead of running a model, for HTTP tests of the real routes.

    engine = ScriptedEngine()
    engine.script = say("Hel", "lo")                 # every choice: two tokens, then EOS
    app = scripted_app(engine)                       # the real app around it
    engine.requests[0].prompt_ids                    # what HTTP asked for

A script receives each request and yields what one step delivers: token events, or an exception if the request
fails. It may await, so a test can hold a request open.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from tests.support.toy_tokenizer import EOS, VOCAB_SIZE, ToyTokenizer
from tgi_asgi.api.served import Served
from tgi_asgi.app import App, create_app
from tgi_asgi.engine.output import ChoiceOutput
from tgi_asgi.errors import IncompleteGeneration, Overloaded, RequestAborted, TgiError, Unavailable
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.runner.plan import Sampled
from tgi_asgi.settings import Settings
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.types import (
    Adapters,
    EngineState,
    FinishReason,
    GenerationRequest,
    ImageProcessor,
    RequestStats,
    Sink,
    TokenEvent,
)

Script = Callable[["ScriptedChannel"], AsyncIterator[Sequence[TokenEvent] | TgiError]]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LOGPROB = -0.5  # of every scripted token; the k-th best alternative has LOGPROB - k


class ScriptedChannel:
    """A request's channel, filled by the script."""

    def __init__(self, engine: ScriptedEngine, request: GenerationRequest, permit: ScriptedPermit) -> None:
        self.engine = engine
        self.request = request
        self.stats = RequestStats(arrival_s=time.monotonic())
        self.is_cancelled = False
        self.ended = asyncio.Event()
        self.permit = permit
        self._script = engine.script
        self._sink: Sink | None = None
        self._waiting: list[Sequence[TokenEvent] | TgiError] = []
        self._task = asyncio.get_running_loop().create_task(self._play())

    def attach(self, sink: Sink) -> None:
        assert self._sink is None, "attached twice"
        self._sink = sink
        waiting, self._waiting = self._waiting, []
        for batch in waiting:
            self._deliver(batch)

    def cancel(self) -> None:
        if self.ended.is_set():
            return
        self.is_cancelled = True
        self._task.cancel()
        self._end()

    def abort(self) -> None:
        self._task.cancel()
        self._end()
        self._deliver(RequestAborted("the request was aborted"))

    async def _play(self) -> None:
        self.stats.scheduled_s = time.monotonic()
        self.stats.cached_tokens = self.engine.num_cached
        k = self.request.prompt_logprobs
        if k is not None:
            best = [(97 + rank, LOGPROB - rank) for rank in range(k)]
            rest = len(self.request.prompt_ids) - 1
            self.stats.prompt_logprobs = [(None, []), *([(LOGPROB, best)] * rest)]
        num_open = self.request.n
        async with aclosing(self._script(self)) as batches:  # type: ignore[type-var]
            async for batch in batches:
                if isinstance(batch, TgiError):
                    self._end()
                    self._deliver(batch)
                    return
                if self.stats.first_token_s is None and batch:
                    self.stats.first_token_s = time.monotonic()
                self.stats.generated_tokens += len(batch)
                finishes = [event.finish for event in batch if event.finish is not None]
                self.stats.finishes += finishes
                num_open -= len(finishes)
                if not num_open:
                    self._end()
                self._deliver(batch)
                if not num_open:
                    return
        self._end()
        self._deliver(IncompleteGeneration("Incomplete generation"))

    def _deliver(self, batch: Sequence[TokenEvent] | TgiError) -> None:
        if self._sink is None:
            self._waiting.append(batch)
        elif isinstance(batch, TgiError):
            self._sink.on_error(batch)
        else:
            self._sink.on_events(batch)

    def _end(self) -> None:
        self.stats.finished_s = time.monotonic()
        self.ended.set()
        self.permit.release()


class ScriptedPermit:
    """Admission for n choices; releasing it twice does nothing."""

    def __init__(self, engine: ScriptedEngine, n: int, tenant: str | None) -> None:
        self._engine = engine
        self.n = n
        self.tenant = tenant

    def split(self, n: int) -> ScriptedPermit:
        self.n -= n
        return ScriptedPermit(self._engine, n, self.tenant)

    def release(self, *, has_run: bool = False) -> None:
        self._engine.num_permits += self.n
        self.n = 0


class ScriptedEngine:
    """A `types.Engine` that plays a script and records its requests."""

    def __init__(
        self, script: Script | None = None, *, num_permits: int = 128, has_vision: bool = False
    ) -> None:
        self.tokenizer = ToyTokenizer(has_vision=has_vision)
        self.state = EngineState.READY
        self.script: Script = script or say("Hello", " world")
        self.num_permits = num_permits
        self.num_cached = 0  # prompt tokens that every request finds in the prefix cache
        self.channels: list[ScriptedChannel] = []

    @property
    def requests(self) -> list[GenerationRequest]:
        return [channel.request for channel in self.channels]

    def start(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {"requests": [channel.request.request_id for channel in self.channels]}

    async def stop(self) -> None:
        self.state = EngineState.DEAD

    def acquire(self, n: int, tenant: str | None = None, *, is_accepted: bool = False) -> ScriptedPermit:
        if self.state is not EngineState.READY and not is_accepted:
            raise Unavailable("The server is shutting down", retry_after_s=5)
        if n > self.num_permits:
            raise Overloaded(retry_after_s=3)
        self.num_permits -= n
        return ScriptedPermit(self, n, tenant)

    def submit(self, request: GenerationRequest, permit: ScriptedPermit) -> ScriptedChannel:
        channel = ScriptedChannel(self, request, permit)
        self.channels.append(channel)
        return channel

    def abort(self, request_id: str) -> int:
        named = [
            channel
            for channel in self.channels
            if channel.request.request_id == request_id and not channel.ended.is_set()
        ]
        for channel in named:
            channel.abort()
        return len(named)

    def reset_prefix_cache(self) -> int:
        num_blocks, self.num_cached = self.num_cached // 16, 0
        return num_blocks


def at_once(script: Script) -> Script:
    """Deliver all tokens in one batch, as to a client that reads slowly."""

    async def play(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        events: list[TokenEvent] = []
        async for batch in script(channel):
            assert not isinstance(batch, TgiError)
            events += batch
        yield events

    return play


def say(*tokens: str | bytes, finish: FinishReason | None = FinishReason.EOS) -> Script:
    """Return a script in which every choice samples these tokens, one per step, and then EOS.

    The request's stop conditions apply as in the real engine: max_tokens, stop strings, stop ids. With
    `finish=None`, the last token repeats until something else ends the choice.
    """

    async def script(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        request, tokenizer = channel.request, channel.engine.tokenizer
        outputs = [ChoiceOutput(i, request.stop, tokenizer, tokenizer.eos_ids) for i in range(request.n)]
        data = [token.encode() if isinstance(token, str) else token for token in tokens]
        step = 0
        while outputs:
            await asyncio.sleep(0)
            token_id = EOS
            if step < len(data) or finish is None:
                token_id = tokenizer.id_of(data[min(step, len(data) - 1)])
            events = {output: output.push(sampled(channel, token_id)) for output in outputs}
            outputs = [output for output, event in events.items() if event.finish is None]
            yield list(events.values())
            step += 1

    return script


def give_vector(*numbers: float) -> Script:
    """Return a script that pools every prompt to this vector."""

    async def script(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        await asyncio.sleep(0)
        channel.stats.vector = np.array(numbers, np.float32)
        yield [TokenEvent(0, 0, finish=FinishReason.STOP)]

    return script


def fail_with(error: TgiError, after: Script | None = None) -> Script:
    """Return a script that fails with `error`, immediately or when another script would finish."""

    async def script(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        if after is not None:
            async for batch in after(channel):
                if not isinstance(batch, TgiError) and any(event.finish for event in batch):
                    break
                yield batch
        await asyncio.sleep(0)
        yield error

    return script


def sampled(channel: ScriptedChannel, token_id: int) -> Sampled:
    """Return a sampled token with as many alternatives as the request asked for."""
    k = channel.request.sampling.logprobs
    if k is None:
        return Sampled(token_id)
    best = [token_id, *(i for i in range(97, 97 + k) if i != token_id)]
    return Sampled(token_id, LOGPROB, [(i, LOGPROB - rank) for rank, i in enumerate(best[:k])])


def toy_info(**changes: Any) -> ModelInfo:
    """Return the scripted model's description for the API, with a context of 512 tokens."""
    values: dict[str, Any] = {
        "model_id": "toy/model",
        "revision": "abc123",
        "architecture": "ToyForCausalLM",
        "dtype": "float32",
        "device": "cpu",
        "vocab_size": VOCAB_SIZE,
        "max_input_tokens": 511,
        "max_total_tokens": 512,
        "eos_token_ids": frozenset({EOS}),
        "created": 1_700_000_000,
        "fingerprint": "fp_toy",
    }
    return ModelInfo(**(values | changes))


@functools.lru_cache
def _compiled(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    """Return a chat template, which takes longer to compile than the app to make, and does not change."""
    return ChatTemplate(source, dict(special_tokens))


def scripted_app(
    engine: ScriptedEngine,
    settings: Settings | None = None,
    *,
    info: ModelInfo | None = None,
    chat_template: str | None = CHATML,
    image_processor: ImageProcessor | None = None,
    adapters: Adapters | None = None,
) -> App:
    """Return the real application around the engine, already loaded; running a lifespan is optional."""
    special_tokens = tuple(engine.tokenizer.special_tokens.items())
    template = _compiled(chat_template, special_tokens) if chat_template else None
    served = Served(
        engine,  # type: ignore[arg-type]
        engine.tokenizer,  # type: ignore[arg-type]
        template,
        info or toy_info(),
        image_processor=image_processor,
        adapters=adapters,
    )
    app = create_app(settings or Settings(model_id="toy/model"), loader=lambda settings, progress: served)
    app.context.served = served
    return app
