"""The lifecycle of a request for vectors: read, check, take a permit, tokenise, compute, answer.

    route = Route("POST", "/v1/embeddings", pooling(parse_embeddings), ...)

Each dialect provides `parse`, a function from a body to a `PoolCall`. Each input becomes a request of the
engine. The inputs of a call run a few at a time, so that a thousand of them leave capacity for others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tgi_asgi.api.call import Conversation
from tgi_asgi.api.context import Served
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.life import Handler, admitted, cache_salt_of, lease_adapters, served_name
from tgi_asgi.api.parse import refuse, refuse_field
from tgi_asgi.api.prompt import chat_prompt
from tgi_asgi.errors import ContextExceeded, ModelNotSupported, Overloaded, TgiError, TooManyPrompts
from tgi_asgi.observe.summary import sync_headers
from tgi_asgi.settings import Settings
from tgi_asgi.types import (
    Adapter,
    Embedding,
    Engine,
    GenerationRequest,
    ModelInfo,
    Permit,
    Pooling,
    SamplingParams,
    Scoring,
    StopConditions,
    TokenEvent,
)

if TYPE_CHECKING:
    from tgi_asgi.types import Vector

MAX_INPUTS = 2048  # per call: OpenAI's limit
MAX_TOKENS = 1 << 21  # per call: they wait as lists of about 36 bytes each; a query counts for each document
_SHARE = 4  # a call runs at most this fraction of `--max-concurrent-requests` at a time
_SLACK_TOKENS = 64  # beyond those kept of a long text, because cutting text shifts token boundaries
_MAX_CUTS = 8  # attempts to cut a document to fit; each renders the template
_RETRY_S = 0.1
_LARGE = 16 * 1024  # numbers in an answer; writing one takes about 50 ns
_BATCH_CHARACTERS = 32 * 1024  # text that a thread tokenises in one turn, in about 10 ms
_Content = TypeVar("_Content", str, list[int])
_Prompt = tuple[list[int], int | None]  # ids; for a pair, the start of its second text, if marked
_SAMPLING, _STOP = SamplingParams(temperature=0.0), StopConditions(max_tokens=1)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts that are scored together."""

    query: str
    document: str
    instruction: str | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """The content for one vector, and its path in the body: `input[3]`."""

    content: str | list[int] | Pair
    where: str


@dataclass(frozen=True, slots=True)
class Truncation:
    """How many tokens to keep of an input that is too long; None: as many as fit."""

    keep: int | None = None
    from_left: bool = False


@dataclass(slots=True)
class Pooled:
    """The vectors of a call's inputs, in order."""

    model: str
    vectors: list[Vector]
    num_tokens: int


@dataclass(slots=True, kw_only=True)
class PoolCall:
    """One request of a client for vectors.

    Attributes:
        answer: Returns the body of the answer; called in a thread if that is slow.
        truncation: How to truncate inputs that are too long; None: refuse them.
        num_numbers: How many numbers the answer has for each input.
    """

    inputs: Sequence[Input]
    how: Embedding | Scoring
    answer: Callable[[Pooled], bytes]
    model: str | None = None
    truncation: Truncation | None = None
    adds_special_tokens: bool = True
    priority: int = 0
    num_numbers: int = 1

    @property
    def pooling(self) -> Pooling:
        return self.how.pooling


Parse = Callable[[bytes, Exchange], PoolCall]


def pooling(parse: Parse) -> Handler:
    """Return the handler of a route whose bodies `parse` reads; `parse` runs in a thread if one is large."""

    async def handle(exchange: Exchange) -> None:
        await answer(exchange, parse)

    return handle


async def answer(exchange: Exchange, parse: Parse) -> None:
    """Answer a request for vectors.

    Raises:
        TgiError: if it is refused or fails.
        ClientDisconnected: if the client disconnects.
    """
    context = exchange.context
    served = context.ready()
    call = await exchange.work(parse, await exchange.read_body(), exchange)
    exchange.large_objects.append(call)
    model = served_name(exchange, call.model)
    if not call.inputs:
        await exchange.respond(200, call.answer(Pooled(model, [], 0)))
        return
    num_together = min(len(call.inputs), max(context.settings.max_concurrent_requests // _SHARE, 1))
    with admitted(exchange, num_together) as permit:
        [adapter] = await lease_adapters(exchange, served, [model])  # must be the first await
        requests = await _requests(exchange, served, call, adapter)
        vectors = await _compute(exchange, served.engine, requests, permit)
    pooled = Pooled(model, vectors, sum(len(request.prompt_ids) for request in requests))
    exchange.is_large |= call.num_numbers * len(vectors) > _LARGE
    body = await exchange.work(call.answer, pooled)
    characters = sum(_num_characters(each) for each in call.inputs)
    headers = sync_headers(exchange, served.info, characters=characters, is_sum=len(vectors) > 1)
    await exchange.respond(200, body, headers=headers)


def embedding_of(info: ModelInfo) -> Embedding:
    """Return how the served model embeds.

    Raises:
        ModelNotSupported: if it does not.
    """
    if info.embedding is None:
        why = info.why_no_pooling if info.scoring is None else "it scores pairs of texts"
        raise ModelNotSupported(f"The model does not embed: {why}", param="model")
    return info.embedding


def scoring_of(info: ModelInfo) -> Scoring | Embedding:
    """Return how the served model scores pairs: as a scoring model, or by the cosine of embeddings.

    Raises:
        ModelNotSupported: if it does neither.
    """
    if info.scoring is None and info.embedding is None:
        raise ModelNotSupported(f"The model does not score: {info.why_no_pooling}", param="model")
    return info.scoring or embedding_of(info)


def check_num_inputs(num_inputs: int, name: str, settings: Settings) -> None:
    """Refuse a call without inputs or with too many."""
    if not num_inputs:
        refuse_field(name, "must not be empty")
    max_inputs = settings.max_client_batch_size or MAX_INPUTS
    if num_inputs > max_inputs:
        message = f"`{name}` takes at most {max_inputs} inputs, got {num_inputs}"
        raise TooManyPrompts(message, param=name)


def read_truncation(tokens: int | None, *, name: str = "truncate_prompt_tokens") -> Truncation | None:
    """Return the truncation that vLLM's field asks for; -1 keeps as much as fits."""
    if tokens is not None and tokens < 1 and tokens != -1:
        refuse_field(name, f"must be -1 or at least 1, got {tokens}")
    return None if tokens is None else Truncation(None if tokens == -1 else tokens)


def _num_characters(given: Input) -> int:
    content = given.content
    if isinstance(content, Pair):
        return len(content.query) + len(content.document)
    return len(content) if isinstance(content, str) else 0


async def _requests(
    exchange: Exchange, served: Served, call: PoolCall, adapter: Adapter | None
) -> list[GenerationRequest]:
    """Tokenise the inputs in threads, a batch at a time, so that other requests get their turn."""
    context = exchange.context
    prompts: list[_Prompt] = []
    num_tokens = 0
    while len(prompts) < len(call.inputs):
        found = await context.text_threads.run(_tokenise, call, len(prompts), served, context.settings)
        num_tokens += sum(len(ids) for ids, _ in found)
        if num_tokens > MAX_TOKENS:
            where = call.inputs[len(prompts)].where.partition("[")[0]
            raise TooManyPrompts(f"`{where}` takes at most {MAX_TOKENS} tokens together", param=where)
        prompts += found
    max_priority = context.settings.max_priority
    salt = cache_salt_of(exchange, None)
    return [
        GenerationRequest(
            request_id=exchange.request_id,
            prompt_ids=ids,
            sampling=_SAMPLING,
            stop=_STOP,
            priority=min(max(call.priority, -max_priority), max_priority),
            cache_salt=salt,
            adapter=adapter,
            is_prefix_cached=not call.pooling.needs_all,
            pooling=call.pooling,
            second_start=second_start,
        )
        for ids, second_start in prompts
    ]


def _tokenise(call: PoolCall, begin: int, served: Served, settings: Settings) -> list[_Prompt]:
    """Tokenise inputs from index `begin` on, until one turn's batch is full."""
    found: list[_Prompt] = []
    left = _BATCH_CHARACTERS
    for given in call.inputs[begin:]:
        found.append(_prompt_of(call, given, served, settings))
        left -= _num_characters(given) + len(found[-1][0])
        if left <= 0:
            break
    return found


def _prompt_of(call: PoolCall, given: Input, served: Served, settings: Settings) -> _Prompt:
    """Return an input's tokens, and for a pair where the second text begins.

    Raises:
        ContextExceeded: if there are too many.
        InvalidRequest: if there are none.
    """
    tokenizer, content, truncation = served.tokenizer, given.content, call.truncation
    limit = call.how.max_tokens
    keep = limit if truncation is None else min(truncation.keep or limit, limit)
    max_chars = (keep + _SLACK_TOKENS) * tokenizer.longest_token
    # Only the document of a pair is cut.
    num_whole = len(content.query) if isinstance(content, Pair) and truncation else _num_characters(given)
    if (truncation is None or isinstance(content, Pair)) and num_whole > limit * tokenizer.longest_token:
        raise _too_long(given, truncation, -(-num_whole // tokenizer.longest_token), keep, is_minimum=True)
    second_start = None
    if isinstance(content, Pair):
        ids, second_start = _pair_prompt(content, served, settings, keep, max_chars, truncation)
    elif isinstance(content, list):
        ids = content if truncation is None or len(content) <= keep else _truncated(content, keep, truncation)
    elif truncation is None:
        ids = tokenizer.encode(content, add_special_tokens=call.adds_special_tokens)
    else:
        ids = tokenizer.encode_cut(
            _truncated(content, max_chars, truncation),
            keep,
            add_special_tokens=call.adds_special_tokens,
            from_left=truncation.from_left,
        )
    if len(ids) > keep:
        raise _too_long(given, truncation, len(ids), keep)
    if not ids:
        refuse(given.where, f"`{given.where}` must not be empty")
    return ids, second_start


def _truncated(content: _Content, keep: int, truncation: Truncation) -> _Content:
    return content[-keep:] if truncation.from_left else content[:keep]


def _pair_prompt(
    pair: Pair,
    served: Served,
    settings: Settings,
    keep: int,
    max_chars: int,
    truncation: Truncation | None,
) -> _Prompt:
    """Return a pair's tokens; if it may be cut, with as much of its document as fits."""
    document = pair.document if truncation is None else _truncated(pair.document, max_chars, truncation)
    scoring, tokenizer = served.info.scoring, served.tokenizer
    if scoring is None or scoring.template is None:
        if truncation is None:
            return tokenizer.encode_pair(pair.query, document)
        return tokenizer.encode_pair(pair.query, document, keep=keep, from_left=truncation.from_left)
    for attempt in range(_MAX_CUTS):
        ids = _templated_pair(pair, document, served, settings)
        over = len(ids) - keep
        if truncation is None or over <= 0 or not document:
            break
        own = tokenizer.encode(document, add_special_tokens=False)
        num_kept = max(len(own) - over, 0) if attempt < _MAX_CUTS - 2 else 0
        if not num_kept:
            document = ""
            continue
        kept = _truncated(own, num_kept, truncation)
        # Drop characters that the cut has split.
        document = tokenizer.decode(kept, skip_special_tokens=False).strip("\ufffd")
    return ids, None


def _templated_pair(pair: Pair, document: str, served: Served, settings: Settings) -> list[int]:
    messages = [{"role": "query", "content": pair.query}, {"role": "document", "content": document}]
    if pair.instruction is not None:
        messages.insert(0, {"role": "system", "content": pair.instruction})
    return chat_prompt(Conversation(messages), served.for_scores, settings, is_bounded=False).ids


def _too_long(
    given: Input, truncation: Truncation | None, num_tokens: int, limit: int, *, is_minimum: bool = False
) -> ContextExceeded:
    """Return the refusal of an input; if it was to be cut, its query is too long."""
    number = f"at least {num_tokens}" if is_minimum else str(num_tokens)
    if truncation is None:
        with_query = " with its query" if isinstance(given.content, Pair) else ""
        message = (
            f"This model's maximum context length is {limit} tokens. However, `{given.where}` has {number}"
            f"{with_query}. Please shorten it, or have it cut. (context_length_exceeded)"
        )
    else:
        message = (
            f"At most {limit} tokens are kept of `{given.where}` with its query. However, without any of the "
            f"document there are {number}. Please shorten the query. (context_length_exceeded)"
        )
    error = ContextExceeded(message, num_tokens, limit)
    error.param, error.field = given.where, None
    return error


async def _compute(
    exchange: Exchange, engine: Engine, requests: Sequence[GenerationRequest], permit: Permit
) -> list[Vector]:
    """Run all requests, as many at a time as the permits allow; cancel all if one fails."""
    watch = asyncio.ensure_future(exchange.wait_for_disconnect())
    work = asyncio.ensure_future(_Window(exchange, engine, permit).run(requests))
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise exchange.note_disconnect()
        return work.result()
    finally:
        watch.cancel()
        work.cancel()
        exchange.cancel_channels()


class _Window:
    """The requests of one call that run at the same time; when one ends, the next uses its permit."""

    def __init__(self, exchange: Exchange, engine: Engine, permit: Permit) -> None:
        self._exchange = exchange
        self._engine = engine
        self._permit = permit
        self._max_running = permit.n
        self._num_running = 0
        self._error: TgiError | None = None
        self._changed = asyncio.Event()

    async def run(self, requests: Sequence[GenerationRequest]) -> list[Vector]:
        """Return the requests' vectors.

        Raises:
            TgiError: if one has failed.
        """
        channels = self._exchange.channels
        for request in requests:
            channel = self._engine.submit(request, await self._next_permit())
            channels.append(channel)
            self._num_running += 1
            channel.attach(self)
        while self._num_running:
            await self._next_end()
        vectors = []
        for channel in channels:
            assert channel.stats.vector is not None
            vectors.append(channel.stats.vector)
        return vectors

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        """Record finished requests."""
        self._num_running -= sum(event.finish is not None for event in events)
        self._changed.set()

    def on_error(self, error: TgiError) -> None:
        """Record that a request, and with it the call, has failed."""
        self._error = self._error or error
        self._changed.set()

    async def _next_permit(self) -> Permit:
        """Return a permit for one more request: part of the initial one, then new ones as requests end."""
        if self._permit.n:
            return self._permit.split(1)
        while self._num_running >= self._max_running:
            await self._next_end()
        while True:
            try:
                return self._engine.acquire(1, self._exchange.tenant)
            except Overloaded:  # another request got the capacity; an accepted call waits for more
                if self._num_running:
                    await self._next_end()
                else:
                    await asyncio.sleep(_RETRY_S)

    async def _next_end(self) -> None:
        if self._error is None:
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error
