"""`POST /v1/completions`: one or many prompts, texts or ids, with echo and best_of."""

from __future__ import annotations

from tgi_asgi.http.collect import collect
from tgi_asgi.http.compute_headers import stream_headers, sync_headers
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.openai_answer import Answer, served_name
from tgi_asgi.http.openai_generation import generation_of
from tgi_asgi.http.openai_logprobs import CompletionLogprobs, TokenNames
from tgi_asgi.http.openai_params import (
    Limits,
    check_common,
    includes_stop,
    refuse,
    sampling_of,
    stop_of,
)
from tgi_asgi.http.openai_prompt import Prompt, completion_prompts, count_prompts
from tgi_asgi.http.openai_response import likeliest, text_completion
from tgi_asgi.http.openai_schema import COMPLETION_DECODER, CompletionRequest
from tgi_asgi.http.openai_stream import ChunkRenderer
from tgi_asgi.http.permits import Permits
from tgi_asgi.http.sse import EventStream

_DEFAULT_TOKENS = 16  # OpenAI's max_tokens for completions


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
    default = None if context.settings.tgi_compat else _DEFAULT_TOKENS
    with Permits(served.engine, best_of, num_prompts) as permits:
        prompts = await context.in_thread(completion_prompts, request, served)
        generations = [
            generation_of(
                exchange,
                request,
                sampling,
                prompt.ids,
                n=best_of,
                max_tokens=max_tokens,
                default_max_tokens=default,
                field="prompt",
                prompt_logprobs=request.logprobs if request.echo else None,
            )
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
