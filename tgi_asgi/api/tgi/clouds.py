"""Cloud platforms' routes: SageMaker's `/invocations`, and Vertex AI's `/vertex` and configured paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import orjson
from msgspec import Raw

from tgi_asgi.api.answer import Choices, likeliest
from tgi_asgi.api.call import Call, Generation, Prepared, Renderer
from tgi_asgi.api.errors import NATIVE, OPENAI
from tgi_asgi.api.exchange import MANY_JOBS, Exchange
from tgi_asgi.api.job import Job
from tgi_asgi.api.life import Parse
from tgi_asgi.api.openai.chat import chat_job, parse_chat
from tgi_asgi.api.openai.choice import ChatChoice
from tgi_asgi.api.openai.completions import parse_completion
from tgi_asgi.api.openai.schema import CHAT_DECODER
from tgi_asgi.api.parse import decode_json, refuse_field
from tgi_asgi.api.tgi.body_kind import main_field, set_dialect
from tgi_asgi.api.tgi.render import AnswerOptions, text_of
from tgi_asgi.api.tgi.request import parse_root, read_request
from tgi_asgi.api.tgi.schema import GENERATE, VERTEX
from tgi_asgi.errors import TgiError
from tgi_asgi.types import TokenEvent


def parse_invocation(body: bytes, exchange: Exchange) -> Call | Callable[[], Call]:
    """Parse a body of `POST /`, chat or completions, depending on its key."""
    parsers: dict[str, Parse] = {"inputs": parse_root, "messages": parse_chat, "prompt": parse_completion}
    return parsers[set_dialect(body, exchange)](body, exchange)


def parse_vertex(body: bytes, exchange: Exchange) -> Callable[[], Call]:
    """Split a body into requests; return a function that parses them, and refuses all if it refuses one."""
    raws = decode_json(body, VERTEX).instances
    limit = exchange.context.settings.max_concurrent_requests
    if not raws:
        refuse_field("instances", "must not be empty")
    if len(raws) > limit:  # checked before parsing: 16 MiB hold a million, and a 429 would be retried forever
        refuse_field("instances", f"ask for {len(raws)} choices, but at most {limit} run at a time")
    exchange.is_large |= len(raws) > MANY_JOBS
    return partial(_vertex_call, raws, exchange)


def _vertex_call(raws: Sequence[Raw], exchange: Exchange) -> Call:
    limit = exchange.context.settings.max_concurrent_requests
    read = []
    for i, raw in enumerate(raws):
        with OPENAI.refusing(f"instances[{i}]"):
            read.append(_read_instance(bytes(raw), exchange, f"instances[{i}]"))
    num_choices = sum(job.n for job, _ in read)
    if num_choices > limit:
        refuse_field("instances", f"ask for {num_choices} choices, but at most {limit} run at a time")
    options = [each for _, each in read]
    return Call(jobs=[job for job, _ in read], render=partial(_Renderer, options), has_headers=False)


def _read_instance(raw: bytes, exchange: Exchange, where: str) -> tuple[Job, AnswerOptions | None]:
    """Return an instance's job, and its `AnswerOptions` unless it is a chat."""
    options = None
    match main_field(raw):
        case "inputs":
            job, options = read_request(decode_json(raw, GENERATE), exchange.context)
        case "messages":
            job = chat_job(decode_json(raw, CHAT_DECODER), exchange)
        case _:
            refuse_field("inputs", "or `messages` is required")
    job.where = where
    return job, options


class _Renderer(Renderer):
    """Renders the texts of all instances, in order; there are no streams."""

    def __init__(self, options: Sequence[AnswerOptions | None], generation: Generation) -> None:
        self._generation = generation
        self._options = options

    def whole(self, job_choices: Sequence[Choices]) -> bytes:
        """Return the predictions."""
        jobs = zip(self._generation.jobs, self._options, job_choices, strict=True)
        return orjson.dumps({"predictions": [_text(*each) for each in jobs]})

    def render(self, job_index: int, events: Sequence[TokenEvent]) -> bytes:
        raise AssertionError("Vertex's predictions are never streamed")

    def fail(self, error: TgiError) -> bytes:
        return orjson.dumps(NATIVE.envelope(error))


def _text(prepared: Prepared, options: AnswerOptions | None, choices: Choices) -> str:
    """Return a prediction: text, or if a chat calls tools, the JSON of its `tool_calls`."""
    if options is not None:
        return options.text_prefix + text_of(choices[likeliest(choices)[0]])
    if prepared.reading is None:
        return text_of(choices[0])
    message = ChatChoice(prepared.reading).message(choices[0])
    calls = message.get("tool_calls")
    return orjson.dumps(calls).decode() if calls else message["content"] or ""
