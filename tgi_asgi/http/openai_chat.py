"""`POST /v1/chat/completions`: decode, check, admit, render and tokenise, hand to the engine, answer."""

from __future__ import annotations

from dataclasses import dataclass

from tgi_asgi.errors import Forbidden
from tgi_asgi.http.collect import collect
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.grammars import compile_grammar, naming
from tgi_asgi.http.openai_answer import Answer, served_name
from tgi_asgi.http.openai_constraints import Constraint, constraint_of
from tgi_asgi.http.openai_generation import generation_of
from tgi_asgi.http.openai_logprobs import ChatLogprobs, TokenNames
from tgi_asgi.http.openai_params import (
    Limits,
    check_common,
    refuse,
    sampling_of,
)
from tgi_asgi.http.openai_plan import AnswerPlan
from tgi_asgi.http.openai_prompt import Prompt, chat_prompt
from tgi_asgi.http.openai_reply import ReplyPlan
from tgi_asgi.http.openai_response import chat_completion
from tgi_asgi.http.openai_schema import CHAT_DECODER, ChatRequest
from tgi_asgi.http.openai_stream import ChunkRenderer
from tgi_asgi.http.openai_tools import ToolPlan, tool_plan
from tgi_asgi.http.permits import Permits
from tgi_asgi.http.sse import EventStream
from tgi_asgi.observe.course import stream_headers, sync_headers
from tgi_asgi.types import Channel, GenerationRequest, SamplingParams


async def chat_completions(exchange: Exchange) -> None:
    """Answer `POST /v1/chat/completions`, streamed or whole."""
    served = exchange.context.ready()
    request = await exchange.read_json(CHAT_DECODER)
    info = served.info
    chat = await exchange.work(check_chat, exchange, request)
    n, logprobs = chat.n, chat.sampling.logprobs
    with Permits(exchange, served.engine, n) as permits:
        prepared = await prepare_chat(exchange, chat)
        prompt, generation = prepared.prompt, prepared.generation
        replies = prepared.reply_plan.replies(n) if prepared.reply_plan is not None else []
        answer = Answer.of(
            exchange,
            request,
            info,
            "chatcmpl",
            [generation.prompt_ids],
            echoes=[prompt.echo] if prompt.echo else (),
            num_reasoning=lambda: sum(reply.num_reasoning_tokens for reply in replies),
        )
        names = TokenNames(served.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        trackers = [ChatLogprobs(names) for _ in range(n)] if logprobs is not None else []
        channel = permits.submit(generation)
    characters = prompt.num_characters
    if request.stream:
        renderer = ChunkRenderer(answer, is_chat=True, trackers=trackers, replies=replies)
        headers = stream_headers(exchange, info, characters=characters)
        await EventStream(exchange, renderer, headers).run([channel])
        return
    [choices] = await collect(exchange, [channel])
    body = chat_completion(answer, choices, trackers, replies)
    await exchange.reply_json(body, headers=sync_headers(exchange, info, characters=characters))


@dataclass(frozen=True, slots=True)
class CheckedChat:
    """A chat request whose values are right; its messages have not been looked at."""

    request: ChatRequest
    n: int
    max_tokens: int | None
    sampling: SamplingParams
    tools: ToolPlan | None
    constraint: Constraint | None


def check_chat(exchange: Exchange, request: ChatRequest) -> CheckedChat:
    """Check what needs no template and no permit.

    Raises:
        InvalidRequest, Forbidden, NotFound: a value is refused, or another model was named.
    """
    context = exchange.context
    info = context.ready().info
    is_compat = context.settings.tgi_compat
    limits = Limits.of(context.settings)
    tools = tool_plan(request, is_compat=is_compat)  # before response_format: TGI's words come first
    check_common(request, limits, info)
    max_tokens, logprobs = _check_chat(request, limits, is_compat=is_compat)
    sampling = sampling_of(request, info, logprobs)
    served_name(exchange, request.model, info)
    return CheckedChat(request, request.n or 1, max_tokens, sampling, tools, constraint_of(request))


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A chat request, ready for the engine, and how its answer is to be read (None: it is text)."""

    prompt: Prompt
    generation: GenerationRequest
    reply_plan: ReplyPlan | None


async def submit_chat(exchange: Exchange, chat: CheckedChat) -> tuple[PreparedChat, Channel]:
    """Take room for a chat of one choice, prepare it and hand it to the engine.

    Raises:
        InvalidRequest, TemplateError: as `prepare_chat`.
        Overloaded, Unavailable: there is no room.
    """
    with Permits(exchange, exchange.context.ready().engine, 1) as permits:
        prepared = await prepare_chat(exchange, chat)
        return prepared, permits.submit(prepared.generation)


async def prepare_chat(exchange: Exchange, chat: CheckedChat) -> PreparedChat:
    """Render and tokenise the messages in a thread, compile what constrains the answer.

    Raises:
        InvalidRequest: a message or a grammar is refused, or the prompt does not fit.
        TemplateError: there is no template, or it refused the messages.
    """
    context = exchange.context
    served = context.ready()
    prompt = await context.in_thread(chat_prompt, chat.request, served, context.settings)
    plan = AnswerPlan(
        chat.request,
        chat.tools,
        chat.constraint,
        served,
        context.settings,
        special_ids=context.special_ids(),
        prompt_tail=prompt.tail,
    )
    grammar = None
    if plan.is_constrained:
        with naming(plan.param):
            source = await context.in_thread(plan.grammar_source)
            assert source is not None
            grammar = await compile_grammar(context, source)
    reply_plan = plan.reply_plan()
    generation = generation_of(
        exchange,
        chat.request,
        chat.sampling,
        prompt.ids,
        n=chat.n,
        max_tokens=chat.max_tokens,
        default_max_tokens=None,
        field="messages",
        grammar=grammar,
        shows_special=reply_plan is not None and bool(reply_plan.kept),
    )
    return PreparedChat(prompt, generation, reply_plan)


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
