"""`POST /v1/completions`: one or many prompts, texts or ids, with echo and best_of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tgi_asgi.errors import TooManyPrompts, UnsupportedSuffix
from tgi_asgi.http.collect import collect
from tgi_asgi.http.context import Served
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.grammars import compile_grammar, naming
from tgi_asgi.http.openai_answer import Answer, served_name
from tgi_asgi.http.openai_constraints import Constraint, constraint_of
from tgi_asgi.http.openai_generation import generation_of
from tgi_asgi.http.openai_logprobs import CompletionLogprobs, TokenNames
from tgi_asgi.http.openai_params import (
    Limits,
    check_common,
    drawn_seed,
    refuse,
    sampling_of,
)
from tgi_asgi.http.openai_prompt import Prompt, completion_prompts, count_prompts
from tgi_asgi.http.openai_response import Choices, likeliest, text_completion
from tgi_asgi.http.openai_schema import COMPLETION_DECODER, CompletionRequest
from tgi_asgi.http.openai_stream import ChunkRenderer
from tgi_asgi.http.permits import Permits
from tgi_asgi.http.sse import EventStream
from tgi_asgi.observe.course import stream_headers, sync_headers
from tgi_asgi.types import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from tgi_asgi.text.constrain.grammar import Grammar

_DEFAULT_TOKENS = 16  # OpenAI's max_tokens for completions


async def completions(exchange: Exchange) -> None:
    """Answer `POST /v1/completions`, streamed or whole."""
    context = exchange.context
    served = context.ready()
    info = served.info
    request = await exchange.read_json(COMPLETION_DECODER)
    checked = await exchange.work(_check, exchange, request)
    with Permits(exchange, served.engine, checked.num_prompts * checked.best_of) as permits:
        prompts = await context.in_thread(completion_prompts, request, served)
        wanted = checked.constraint
        grammar = None
        if wanted is not None:
            with naming(wanted.param):
                grammar = await compile_grammar(context, await context.in_thread(wanted.source))
        generations = [checked.generation_of(exchange, prompt, grammar) for prompt in prompts]
        answer = Answer.of(
            exchange,
            request,
            info,
            "cmpl",
            [generation.prompt_ids for generation in generations],
            echoes=[prompt.echo for prompt in prompts] if request.echo else (),
            hides_tokens=checked.hides_tokens,
        )
        logprobs = _Logprobs(answer, request, prompts, served)
        channels = [permits.submit(generation) for generation in generations]
    characters = sum(prompt.num_characters for prompt in prompts)
    if request.stream:
        renderer = ChunkRenderer(answer, is_chat=False, trackers=logprobs.trackers, on_begin=logprobs.begin)
        headers = stream_headers(exchange, info, characters=characters)
        await EventStream(exchange, renderer, headers).run(channels)
        return
    parts = await collect(exchange, channels)
    for part in range(checked.num_prompts):
        logprobs.begin(part)
    num_generated = sum(len(events) for choices in parts for events in choices)
    chosen = [events for choices in parts for events in checked.chosen(choices)]
    body = text_completion(answer, chosen, logprobs.trackers, num_generated)
    headers = sync_headers(exchange, info, characters=characters, is_sum=True)
    await exchange.reply_json(body, headers=headers)


@dataclass(frozen=True, slots=True)
class _Checked:
    """A completion request whose values are right; its prompts have not been looked at."""

    request: CompletionRequest
    num_prompts: int
    n: int
    best_of: int
    sampling: SamplingParams
    default_max_tokens: int | None
    constraint: Constraint | None

    @property
    def hides_tokens(self) -> bool:
        """Scoring asks for no token at all: then one is sampled and not shown."""
        return self.request.max_tokens == 0

    def generation_of(self, exchange: Exchange, prompt: Prompt, grammar: Grammar | None) -> GenerationRequest:
        """Return the engine's request for one of the prompts."""
        request = self.request
        sampling = self.sampling
        if request.seed is None:  # or equal prompts of one call would all get the same answer
            sampling = dataclasses.replace(sampling, seed=drawn_seed())
        return generation_of(
            exchange,
            request,
            sampling,
            prompt.ids,
            n=self.best_of,
            max_tokens=1 if self.hides_tokens else request.max_tokens,
            default_max_tokens=self.default_max_tokens,
            field="prompt",
            prompt_logprobs=request.logprobs if request.echo else None,
            grammar=grammar,
        )

    def chosen(self, choices: Choices) -> Choices:
        """Return the choices of one prompt that are shown: all, or the likeliest."""
        return likeliest(choices, self.n) if self.best_of > self.n else choices


def _check(exchange: Exchange, request: CompletionRequest) -> _Checked:
    """Check what needs no tokens and no permit."""
    context = exchange.context
    info = context.ready().info
    limits = Limits.of(context.settings)
    check_common(request, limits, info)
    num_prompts = count_prompts(request)
    n = request.n or 1
    best_of = _check_own(request, limits, num_prompts, n)
    # Whoever wants the best of several needs their log-probabilities.
    logprobs = 0 if request.logprobs is None and best_of > n else request.logprobs
    sampling = sampling_of(request, info, logprobs)
    served_name(exchange, request.model, info)
    default = None if context.settings.tgi_compat else _DEFAULT_TOKENS
    return _Checked(request, num_prompts, n, best_of, sampling, default, constraint_of(request))


class _Logprobs:
    """The log-probabilities of a completion request's choices, and of the prompts that it echoes."""

    def __init__(
        self, answer: Answer, request: CompletionRequest, prompts: list[Prompt], served: Served
    ) -> None:
        self._answer = answer
        self._has_prompt = bool(request.echo)
        self._special_ids = served.tokenizer.special_ids
        self.trackers: list[CompletionLogprobs] = []
        if request.logprobs is None:
            return
        names = TokenNames(served.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        self.trackers = [
            CompletionLogprobs(names, request.logprobs, prompt.text or "")
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


def _check_own(request: CompletionRequest, limits: Limits, num_prompts: int, n: int) -> int:
    """Check completions' own fields; return best_of."""
    if request.suffix:
        raise UnsupportedSuffix(
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
            param="suffix",
            code="unsupported_parameter",
        )
    if num_prompts > limits.prompts:
        message = f"Number of prompts exceeds the maximum allowed batch size of {limits.prompts}"
        raise TooManyPrompts(message, param="prompt")
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
