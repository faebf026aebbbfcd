"""OpenAI's routes under `/v1`: decode, check, admit, tokenise, hand to the engine, answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.routing import Route

from tgi_asgi.errors import Forbidden
from tgi_asgi.http.collect import collect
from tgi_asgi.http.compute_headers import stream_headers, sync_headers
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.openai_answer import Answer, model_not_found, served_name
from tgi_asgi.http.openai_length import room_for, tgi_room_for
from tgi_asgi.http.openai_logprobs import ChatLogprobs, CompletionLogprobs, TokenNames
from tgi_asgi.http.openai_params import (
    Limits,
    check_common,
    check_tools,
    includes_stop,
    refuse,
    sampling_of,
    stop_of,
)
from tgi_asgi.http.openai_prompt import Prompt, chat_prompt, completion_prompts, count_prompts
from tgi_asgi.http.openai_response import chat_completion, likeliest, text_completion
from tgi_asgi.http.openai_schema import (
    CHAT_DECODER,
    COMPLETION_DECODER,
    ChatRequest,
    CommonRequest,
    CompletionRequest,
)
from tgi_asgi.http.openai_stream import ChunkRenderer
from tgi_asgi.http.permits import Permits
from tgi_asgi.http.routing import route
from tgi_asgi.http.sse import EventStream
from tgi_asgi.types import GenerationRequest, ModelInfo, SamplingParams

_COMPLETION_TOKENS = 16  # OpenAI's default for completions
_OBJECT_DECODER = msgspec.json.Decoder(dict[str, Any])


def routes() -> list[Route]:
    """Return the routes under `/v1`."""
    return [
        route("/v1/chat/completions", post=chat_completions),
        route("/v1/completions", post=completions),
        route("/v1/responses", post=responses),
        route("/v1/models", get=list_models),
        route("/v1/models/{model:path}", get=retrieve_model),
    ]


async def chat_completions(exchange: Exchange) -> None:
    """Answer `POST /v1/chat/completions`."""
    exchange.context.ready()
    await serve_chat(exchange, await exchange.read_json(CHAT_DECODER))


async def serve_chat(exchange: Exchange, request: ChatRequest) -> None:
    """Answer a decoded chat request, streamed or whole."""
    served = exchange.context.ready()
    info = served.info
    chat = check_chat(exchange, request)
    n, logprobs = chat.n, chat.sampling.logprobs
    with Permits(served.engine, n) as permits:
        prompt, generation = await prepare_chat(exchange, chat)
        answer = Answer.of(
            exchange,
            request,
            info,
            "chatcmpl",
            [generation.prompt_ids],
            echoes=[prompt.echo] if prompt.echo else (),
        )
        names = TokenNames(served.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        trackers = (
            [ChatLogprobs(names, include_stop=includes_stop(request)) for _ in range(n)]
            if logprobs is not None
            else []
        )
        channel = permits.submit(generation)
    characters = prompt.num_characters
    if request.stream:
        renderer = ChunkRenderer(answer, is_chat=True, trackers=trackers)
        headers = stream_headers(exchange, info, characters=characters)
        await EventStream(exchange, renderer, headers).run([channel])
        return
    [choices] = await collect(exchange, [channel])
    body = chat_completion(answer, choices, trackers)
    await exchange.reply_json(body, headers=sync_headers(exchange, info, characters=characters))


@dataclass(frozen=True, slots=True)
class CheckedChat:
    """A chat request whose values are right; its messages have not been looked at."""

    request: ChatRequest
    n: int
    max_tokens: int | None
    sampling: SamplingParams


def check_chat(exchange: Exchange, request: ChatRequest) -> CheckedChat:
    """Check what needs no template and no permit.

    Raises:
        InvalidRequest, Forbidden, NotFound: a value is refused, or another model was named.
    """
    context = exchange.context
    info = context.ready().info
    is_compat = context.settings.tgi_compat
    limits = Limits.of(context.settings)
    check_common(request, limits)
    check_tools(request, is_compat=is_compat)
    max_tokens, logprobs = _check_chat(request, limits, is_compat=is_compat)
    sampling = sampling_of(request, info, logprobs)
    stop_of(request, max_tokens if max_tokens is not None else info.max_total_tokens, info)
    served_name(exchange, request.model, info)
    return CheckedChat(request, request.n or 1, max_tokens, sampling)


async def prepare_chat(exchange: Exchange, chat: CheckedChat) -> tuple[Prompt, GenerationRequest]:
    """Render and tokenise the messages in a thread, and build the engine's request.

    Raises:
        InvalidRequest: a message is refused, or the prompt does not fit.
        TemplateError: there is no template, or it refused the messages.
    """
    context = exchange.context
    is_compat = context.settings.tgi_compat
    prompt = await context.in_thread(chat_prompt, chat.request, context.ready(), is_compat=is_compat)
    generation = _generation(
        exchange, chat.request, chat.sampling, prompt, chat.max_tokens, "messages", None, chat.n
    )
    return prompt, generation


async def completions(exchange: Exchange) -> None:
    """Answer `POST /v1/completions`."""
    exchange.context.ready()
    await serve_completion(exchange, await exchange.read_json(COMPLETION_DECODER))


async def serve_completion(exchange: Exchange, request: CompletionRequest) -> None:
    """Answer a decoded completion request, streamed or whole."""
    context = exchange.context
    served = context.ready()
    info = served.info
    limits = Limits.of(context.settings)
    check_common(request, limits)
    num_prompts = count_prompts(request)
    n = request.n or 1
    best_of = _check_completion(request, limits, num_prompts, n)
    # Scoring asks for no token at all: one is sampled and not shown.
    hides_tokens = request.max_tokens == 0
    max_tokens = 1 if hides_tokens else request.max_tokens
    # Whoever wants the best of several needs their log-probabilities.
    logprobs = 0 if request.logprobs is None and best_of > n else request.logprobs
    sampling = sampling_of(request, info, logprobs)
    stop_of(request, max_tokens if max_tokens is not None else info.max_total_tokens, info)
    served_name(exchange, request.model, info)
    default = None if context.settings.tgi_compat else _COMPLETION_TOKENS
    with Permits(served.engine, best_of, num_prompts) as permits:
        prompts = await context.in_thread(completion_prompts, request, served)
        generations = [
            _generation(exchange, request, sampling, prompt, max_tokens, "prompt", default, best_of)
            for prompt in prompts
        ]
        answer = Answer.of(
            exchange,
            request,
            info,
            "cmpl",
            [generation.prompt_ids for generation in generations],
            echoes=[prompt.echo for prompt in prompts] if request.echo else (),
            hides_tokens=hides_tokens,
        )
        logprobs_of = _CompletionTrackers(answer, request, prompts, exchange)
        channels = [permits.submit(generation) for generation in generations]
    characters = sum(prompt.num_characters for prompt in prompts)
    if request.stream:
        renderer = ChunkRenderer(
            answer, is_chat=False, trackers=logprobs_of.trackers, on_begin=logprobs_of.begin
        )
        headers = stream_headers(exchange, info, characters=characters)
        await EventStream(exchange, renderer, headers).run(channels)
        return
    parts = await collect(exchange, channels)
    for part in range(num_prompts):
        logprobs_of.begin(part)
    num_generated = sum(len(events) for choices in parts for events in choices)
    chosen = [events for choices in parts for events in (likeliest(choices, n) if best_of > n else choices)]
    body = text_completion(answer, chosen, logprobs_of.trackers, num_generated)
    await exchange.reply_json(body, headers=sync_headers(exchange, info, characters=characters))


async def responses(exchange: Exchange) -> None:
    """Refuse `POST /v1/responses`, once its shape is right."""
    body = await exchange.read_json(_OBJECT_DECODER)
    if not isinstance(body.get("input"), str | list):
        refuse("input", "`input` must be a string or a list of items")
    refuse(
        "input",
        "/v1/responses is not supported by this server yet; use /v1/chat/completions",
        "unsupported_endpoint",
    )


async def list_models(exchange: Exchange) -> None:
    """Answer with the served model and its aliases, the primary name first."""
    info = exchange.context.ready().info
    names = (info.model_id, *info.aliases)
    await exchange.reply_json({"object": "list", "data": [_model_object(name, info) for name in names]})


async def retrieve_model(exchange: Exchange) -> None:
    """Answer with one model by its name, which may hold slashes."""
    info = exchange.context.ready().info
    name = exchange.scope["path_params"]["model"]
    if name not in (info.model_id, *info.aliases):
        raise model_not_found(name)
    await exchange.reply_json(_model_object(name, info))


class _CompletionTrackers:
    """The log-probabilities of a completion request's choices, and of the prompts that it echoes."""

    def __init__(
        self, answer: Answer, request: CompletionRequest, prompts: list[Prompt], exchange: Exchange
    ) -> None:
        served = exchange.context.ready()
        self._answer = answer
        self._has_prompt = bool(request.echo)
        self._special_ids = served.tokenizer.special_ids
        self.trackers: list[CompletionLogprobs] = []
        if request.logprobs is None:
            return
        names = TokenNames(served.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        self.trackers = [
            CompletionLogprobs(
                names, request.logprobs, len(prompt.text or ""), include_stop=includes_stop(request)
            )
            for prompt in prompts
            for _ in range(answer.n)
        ]

    def begin(self, part: int) -> None:
        """Give the choices of one prompt the entries of its tokens."""
        if not (self._has_prompt and self.trackers):
            return
        logprobs = self._answer.channels[part].stats.prompt_logprobs
        assert logprobs is not None, "the engine fills these before the first token"
        for index in range(part * self._answer.n, (part + 1) * self._answer.n):
            self.trackers[index].push_prompt(self._answer.prompts[part], logprobs, self._special_ids)


def _check_chat(request: ChatRequest, limits: Limits, *, is_compat: bool) -> tuple[int | None, int | None]:
    """Check chat's own fields; return max_tokens and how many log-probabilities are wanted."""
    field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    max_tokens: int | None = getattr(request, field)
    if max_tokens == 0:
        refuse(field, f"`{field}` must be at least 1, got 0")
    top = request.top_logprobs or 0
    if top > limits.top_logprobs:
        refuse("top_logprobs", f"`top_logprobs` must be at most {limits.top_logprobs}, got {top}")
    if top and not request.logprobs and not is_compat:
        refuse("top_logprobs", "`top_logprobs` is only allowed with `logprobs: true`")
    if request.chat_template is not None:
        raise Forbidden("`chat_template` is not accepted from requests")
    return max_tokens, top if request.logprobs else None


def _check_completion(request: CompletionRequest, limits: Limits, num_prompts: int, n: int) -> int:
    """Check completions' own fields; return best_of."""
    if request.suffix:
        refuse(
            "suffix",
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
            "unsupported_parameter",
        )
    if num_prompts > limits.prompts:
        refuse("prompt", f"Number of prompts exceeds the maximum allowed batch size of {limits.prompts}")
    best_of = n if request.best_of is None else request.best_of
    if best_of < n:
        refuse("best_of", f"`best_of` must be at least `n` ({n}), got {best_of}")
    if best_of > limits.best_of:
        refuse("best_of", f"`best_of` must be at most {limits.best_of}, got {best_of}")
    if best_of > n and request.stream:
        refuse("best_of", "`best_of` above `n` is not possible with `stream: true`")
    if num_prompts * best_of > limits.choices:
        refuse("n", f"Prompts times choices must be at most {limits.choices}, got {num_prompts * best_of}")
    if request.logprobs is not None and request.logprobs > limits.top_logprobs:
        refuse("logprobs", f"`logprobs` must be at most {limits.top_logprobs}, got {request.logprobs}")
    return best_of


def _generation(
    exchange: Exchange,
    request: CommonRequest,
    sampling: SamplingParams,
    prompt: Prompt,
    max_tokens: int | None,
    field: str,
    default: int | None,
    n: int,
) -> GenerationRequest:
    """Check the lengths of one prompt and its answer, and build the engine's request."""
    context = exchange.context
    info = context.ready().info
    ids = _truncated(prompt.ids, request.truncate_prompt_tokens, info, max_tokens)
    if context.settings.tgi_compat:
        budget = tgi_room_for(info, len(ids), max_tokens)
    else:
        budget = room_for(info, len(ids), max_tokens, field=field, default=default)
    shows_prompt = isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None
    return GenerationRequest(
        request_id=exchange.request_id,
        prompt_ids=ids,
        sampling=sampling,
        stop=stop_of(request, budget, info),
        n=n,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
        prompt_logprobs=sampling.logprobs if shows_prompt else None,
        is_prefix_cached=not shows_prompt,
    )


def _truncated(ids: list[int], keep: int | None, info: ModelInfo, max_tokens: int | None) -> list[int]:
    """Return the last `keep` ids; -1 keeps as many as the context has room for."""
    if keep is None:
        return ids
    if keep == -1:
        keep = max(min(info.max_total_tokens - (max_tokens or 1), info.max_input_tokens), 1)
    return ids[-keep:]


def _model_object(name: str, info: ModelInfo) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": info.created,
        "owned_by": "tgi-asgi",
        "root": info.model_id,
        "parent": None,
        "max_model_len": info.max_total_tokens,
    }
