"""Requests of `/api/chat` and `/api/generate`, and their conversion to calls."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Struct

from tgi_asgi.api.call import Call
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.job import Constraint, Conversation, Job, Text, ToolChoice
from tgi_asgi.api.limits import Limits, Overflow, check_stops
from tgi_asgi.api.ollama.render import NDJSON, LineRenderer
from tgi_asgi.api.openai.schema import ToolCall, ToolEntry
from tgi_asgi.api.openai.tools import read_choice, read_tools
from tgi_asgi.api.parse import (
    NO_IMAGES,
    OMITTED_IMAGE,
    ONLY_USERS,
    Fraction,
    Penalty,
    Share,
    check_ranges,
    decode_json,
    range_of,
    refuse_field,
)
from tgi_asgi.api.prompt_images import Images
from tgi_asgi.api.prompt_text import leaves_open, thinking_variables
from tgi_asgi.api.sampling import sampling
from tgi_asgi.errors import Forbidden
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.settings.sampling import SamplingDefaults
from tgi_asgi.text.chat.message import ChatMessage

# As in Ollama, a model that recommends values replaces these.
OLLAMA_DEFAULTS = SamplingDefaults(temperature=0.8, top_k=40, top_p=0.9)
_NO_TIME = re.compile(r"[+-]?0+(\.0*)?([num]?s|m|h)?")  # how long to keep the model, as Go writes it
_AS_GIVEN = ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty")


Whole = int | float  # Ollama cuts off what is behind the point


class OllamaOptions(Struct):
    """Sampling options; load options (`num_ctx`, ...) are the administrator's."""

    temperature: Annotated[float, range_of(minimum=0)] | None = None
    top_k: Whole | None = None
    top_p: Fraction | None = None
    min_p: Fraction | None = None
    typical_p: Share | None = None
    repeat_penalty: Annotated[float, range_of(exclusiveMinimum=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Whole | None = None  # negative: random
    num_predict: Whole | None = None  # not positive: until the context is full
    stop: list[str] | None = None


class OllamaMessage(Struct):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class _Request(Struct, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    keep_alive: float | str | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, range_of(minimum=0, maximum=20)] | None = None  # only with `logprobs`


class OllamaChat(_Request, kw_only=True):
    """Body of `POST /api/chat`; without messages it asks to load or unload the model."""

    messages: list[OllamaMessage] | None = None
    tools: list[ToolEntry] | None = None
    tool_choice: str | dict[str, Any] | None = None  # not Ollama's own, but some of its clients send it


class OllamaGenerate(_Request, kw_only=True):
    """Body of `POST /api/generate`; without a prompt it asks to load or unload the model."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    template: str | None = None
    suffix: str | None = None
    context: list[Any] | None = None
    images: list[Any] | None = None


_CHAT = msgspec.json.Decoder(OllamaChat)
_GENERATE = msgspec.json.Decoder(OllamaGenerate)


def model_of(given: str | None, exchange: Exchange) -> str | None:
    """Return the name of the model or adapter; `name:latest` is `name`, unless it is served by that name."""
    if given is None or exchange.context.ready().serves(given):
        return given
    return given.removesuffix(":latest")


def parse_chat(body: bytes, exchange: Exchange) -> Call:
    """Parse a chat."""
    request = decode_json(body, _CHAT)
    tools = read_tools(request.tools)
    images = exchange.context.ready().new_images()
    messages = _messages(request.messages or [], images)
    if not messages:
        return _call(request, exchange, None, is_chat=True)
    chat = Conversation(
        messages,
        tools=[tool.for_template() for tool in tools] or None,
        offers_tools=request.tool_choice != "none",
        variables=_variables(request),
        is_continued=leaves_open(messages),
        images=images,
    )
    offered = {entry.type for entry in request.tools or ()}
    choice = read_choice(tools, request.tool_choice, offered=offered, is_parallel=True)
    return _call(request, exchange, chat, choice, is_chat=True)


def parse_generate(body: bytes, exchange: Exchange) -> Call:
    """Parse a request with a single prompt."""
    request = decode_json(body, _GENERATE)
    if request.template:
        raise Forbidden("`template` is not accepted from requests")
    served = exchange.context.ready()
    images = served.new_images()
    parts = _images(request.images, "images", images)
    if request.raw or request.suffix or served.chat_template is None:
        if request.system:
            rule = "needs a chat template: `raw` and `suffix` use none, or the model has none"
            refuse_field("system", rule)
        before = served.image_processor.placeholder * len(parts) if served.image_processor else ""
        text = Text(before + (request.prompt or ""), suffix=request.suffix or "", images=images)
        return _call(request, exchange, text if request.prompt or request.suffix else None)
    given = (("system", request.system), ("user", [*parts, request.prompt] if parts else request.prompt))
    messages = [{"role": role, "content": content} for role, content in given if content]
    chat = Conversation(messages, variables=_variables(request), images=images)
    return _call(request, exchange, chat if request.prompt else None)


def _call(
    request: _Request,
    exchange: Exchange,
    prompt: Conversation | Text | None,
    tools: ToolChoice | None = None,
    *,
    is_chat: bool = False,
) -> Call:
    """Return the call of a request; without a prompt it has no jobs."""
    options = request.options or OllamaOptions()
    _check(request, options, Limits.of(exchange.context.settings))
    info = exchange.context.ready().info
    return Call(
        jobs=[] if prompt is None else [_job(request, options, prompt, tools, info)],
        render=partial(
            LineRenderer,
            exchange,
            is_chat=is_chat,
            shows_logprobs=bool(request.logprobs),
            says_unloaded=_NO_TIME.fullmatch(str(request.keep_alive)) is not None,
        ),
        model=model_of(request.model, exchange),
        stream=request.stream is not False,
        stream_type=NDJSON,
        keep_alive=b"",  # none, because clients parse each line as JSON
    )


def _check(request: _Request, options: OllamaOptions, limits: Limits) -> None:
    check_ranges(request)
    check_ranges(options, "options.")
    check_stops(tuple(options.stop or ()), limits.stops, "options.stop")
    num_top = request.top_logprobs or 0
    if num_top > limits.top_logprobs:
        refuse_field("top_logprobs", f"must be at most {limits.top_logprobs}, got {num_top}")
    if getattr(request, "context", None):
        refuse_field("context", "is not supported", "unsupported_parameter")


def _job(
    request: _Request,
    options: OllamaOptions,
    prompt: Conversation | Text,
    tools: ToolChoice | None,
    info: ModelInfo,
) -> Job:
    """Return the job of a checked request."""
    seed, num_predict = int(options.seed or 0), int(options.num_predict or 0)
    given = request.format
    kind = "json" if isinstance(given, dict) else "json_object"
    return Job(
        prompt=prompt,
        sampling=sampling(
            info,
            OLLAMA_DEFAULTS.replaced_by(info.sampling),
            repetition_penalty=options.repeat_penalty,
            seed=seed if options.seed is not None and seed >= 0 else None,
            top_k=None if options.top_k is None else int(options.top_k),
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            **{name: getattr(options, name) for name in _AS_GIVEN},
        ),
        max_tokens=num_predict if num_predict > 0 else None,
        overflow=Overflow.CLIPPED,
        stop=tuple(options.stop or ()),
        constraint=None if given in (None, "") else Constraint.of("format", kind, given),
        tools=tools,
        shows_reasoning=request.think is not False,
    )


def _variables(request: _Request) -> dict[str, Any]:
    """Return the template variables that control thinking, under the names that models use."""
    think = request.think
    return thinking_variables(think is not False, think) if think is not None else {}


def _images(given: list[Any] | None, path: str, images: Images | None) -> list[dict[str, str]]:
    """Add base64 images; return their placeholders, which precede the text."""
    if given and images is None:
        refuse_field(path, f"is not supported: {NO_IMAGES}", "unsupported_parameter")
    if images is None:
        return []
    return [images.add(image, f"{path}[{j}]", is_base64=True) for j, image in enumerate(given or ())]


def _messages(given: list[OllamaMessage], images: Images | None) -> list[ChatMessage]:
    """Return messages in template form; add the call ids that some templates need and few clients send."""
    ids: dict[str | None, str] = {}  # by function name
    messages: list[ChatMessage] = []
    for i, message in enumerate(given):
        content = _content(message, f"messages[{i}].images", images)
        result: ChatMessage = {"role": message.role, "content": content}
        if message.thinking:
            result["reasoning_content"] = message.thinking
        for call in message.tool_calls or ():
            name = call.function.name
            call.id = ids[name] = call.id or name
        if message.tool_calls:
            result["tool_calls"] = [call.for_template() for call in message.tool_calls]
        if message.role == "tool":
            result["name"] = name = message.tool_name or ""
            result["tool_call_id"] = message.tool_call_id or ids.get(name, name)
        messages.append(result)
    return messages


def _content(message: OllamaMessage, path: str, images: Images | None) -> Any:
    """Return a message's content in template form: a text, or a list if there are images."""
    text = message.content or ""
    if message.role == "tool":  # agents send on what their tools return
        omitted = [OMITTED_IMAGE for _ in message.images or ()]
        return "\n".join([*omitted, text] if text else omitted)
    if message.images and images is not None and message.role != "user":
        refuse_field(path, f"is not supported: {ONLY_USERS}", "unsupported_parameter")
    parts: list[Any] = [*_images(message.images, path, images)]
    return [*parts, text] if parts and text else parts or text
