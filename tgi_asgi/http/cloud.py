"""What clouds call: SageMaker's `/invocations`, Vertex AI's `/vertex` and the paths that it names itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec
import orjson
from starlette.routing import Route

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.http import health, openai_chat, openai_completions, tgi
from tgi_asgi.http.asgi import JSON
from tgi_asgi.http.by_key import Kind, dispatch, kind_of
from tgi_asgi.http.collect import collect
from tgi_asgi.http.context import Served
from tgi_asgi.http.errors import Dialect
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.openai_reply import ChoiceReply, ReplyPlan
from tgi_asgi.http.openai_schema import CHAT_DECODER
from tgi_asgi.http.parse import decode_json
from tgi_asgi.http.permits import Permits
from tgi_asgi.http.routing import route
from tgi_asgi.http.tgi_render import Events, pick_best, text_of
from tgi_asgi.http.tgi_schema import GENERATE, VERTEX, VertexResponse
from tgi_asgi.http.tgi_validation import NativeLimits, NativePlan, plan_request
from tgi_asgi.settings import Settings
from tgi_asgi.types import GenerationRequest


def routes(settings: Settings) -> list[Route]:
    """Return the clouds' routes, Vertex's own among them."""
    found = [
        route("/invocations", post=invocations, generates=True),
        route("/vertex", post=vertex, generates=True),
    ]
    # Requests have lost their trailing slash by the time they are routed.
    if settings.aip_predict_route:
        found.append(route(settings.aip_predict_route.rstrip("/"), post=vertex, generates=True))
    if settings.aip_health_route:
        found.append(route(settings.aip_health_route.rstrip("/"), get=health.health, is_quiet=True))
    return found


async def invocations(exchange: Exchange) -> None:
    """Answer as `POST /`, chat or completions would, by the body's key."""
    exchange.context.ready()
    match await dispatch(exchange):
        case Kind.INPUTS:
            await tgi.generate_compat(exchange)
        case Kind.MESSAGES:
            await openai_chat.chat_completions(exchange)
        case Kind.PROMPT:
            await openai_completions.completions(exchange)


async def vertex(exchange: Exchange) -> None:
    """Answer with the text of each instance, in order; one that fails fails the call with its own status."""
    exchange.dialect = Dialect.NATIVE  # Vertex may have named a path of its own for this
    served = exchange.context.ready()
    raws = (await exchange.read_json(VERTEX)).instances
    if not raws:
        raise InvalidRequest("`instances` must not be empty", param="instances")
    instances: list[_Instance] = []
    for i, raw in enumerate(raws):
        with _naming(i):
            instances.append(_read_instance(exchange, served, bytes(raw)))
    num_choices = sum(instance.num_choices for instance in instances)
    most = exchange.context.settings.max_concurrent_requests
    if num_choices > most:  # a 429 would have clients try for ever
        raise InvalidRequest(
            f"`instances` ask for {num_choices} choices, but at most {most} run at a time",
            param="instances",
        )
    generations = []
    with Permits(exchange, served.engine, num_choices) as permits:
        for i, instance in enumerate(instances):
            with _naming(i):
                generations.append(await instance.prepare(exchange, served))
        channels = [permits.submit(generation) for generation in generations]
    parts = await collect(exchange, channels)
    texts = [instance.text_of(choices) for instance, choices in zip(instances, parts, strict=True)]
    await exchange.reply(200, msgspec.json.encode(VertexResponse(texts)), JSON)


class _Instance(Protocol):
    """One of a Vertex call's requests."""

    @property
    def num_choices(self) -> int: ...

    async def prepare(self, exchange: Exchange, served: Served) -> GenerationRequest: ...

    def text_of(self, choices: Sequence[Events]) -> str: ...


@dataclass(frozen=True, slots=True)
class _TextInstance:
    plan: NativePlan

    @property
    def num_choices(self) -> int:
        return self.plan.num_choices

    async def prepare(self, exchange: Exchange, served: Served) -> GenerationRequest:
        return await tgi.prepare(exchange, served, self.plan)

    def text_of(self, choices: Sequence[Events]) -> str:
        return self.plan.text_prefix + text_of(choices[pick_best(choices)])


@dataclass(slots=True)
class _ChatInstance:
    chat: openai_chat.CheckedChat
    reply_plan: ReplyPlan | None = None  # of an answer that has more than text, once it is prepared

    @property
    def num_choices(self) -> int:
        return self.chat.n

    async def prepare(self, exchange: Exchange, served: Served) -> GenerationRequest:
        prepared = await openai_chat.prepare_chat(exchange, self.chat)
        self.reply_plan = prepared.reply_plan
        return prepared.generation

    def text_of(self, choices: Sequence[Events]) -> str:
        """Return the content; a prediction is a string, so calls are the JSON text of what chat answers."""
        if self.reply_plan is None:
            return text_of(choices[0])
        reply = ChoiceReply(self.reply_plan)
        message = reply.message(reply.push(choices[0]))
        calls = message.get("tool_calls")
        return orjson.dumps(calls).decode() if calls else message["content"] or ""


def _read_instance(exchange: Exchange, served: Served, raw: bytes) -> _Instance:
    match kind_of(raw):
        case Kind.INPUTS:
            limits = NativeLimits.of(exchange.context.settings, served.info)
            return _TextInstance(plan_request(decode_json(raw, GENERATE), limits, is_stream=False))
        case Kind.MESSAGES:
            return _ChatInstance(openai_chat.check_chat(exchange, decode_json(raw, CHAT_DECODER)))
        case Kind.PROMPT:
            raise InvalidRequest("`inputs` or `messages` is required", param="inputs")


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Say in a refusal which instance it means."""
    try:
        yield
    except InvalidRequest as error:
        where = f"instances[{index}]"
        error.message = f"{where}: {error.message}"
        error.param = f"{where}.{error.param}" if error.param else where
        raise
