"""`POST /v1/completions`: one or more prompts, as texts or ids, with echo and best_of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from tgi_asgi.api.call import Call, Generation, Renderer
from tgi_asgi.api.errors import OPENAI
from tgi_asgi.api.exchange import MANY_JOBS, Exchange
from tgi_asgi.api.job import Text
from tgi_asgi.api.limits import Limits
from tgi_asgi.api.openai.choice import TextChoice
from tgi_asgi.api.openai.logprobs import CompletionLogprobs, TokenNames
from tgi_asgi.api.openai.params import (
    THINKING_BUDGETS,
    check_common,
    check_ids,
    check_renamed,
    constraint_of,
    job_of,
    thinking_budget,
)
from tgi_asgi.api.openai.render import CompletionRenderer
from tgi_asgi.api.openai.schema import COMPLETION_DECODER, CompletionRequest
from tgi_asgi.api.parse import decode_json, refuse, refuse_field
from tgi_asgi.api.sampling import random_seed
from tgi_asgi.errors import Field, TooManyPrompts, UnsupportedSuffix

_DEFAULT_TOKENS = 16  # OpenAI's max_tokens for completions


def parse_completion(body: bytes, exchange: Exchange) -> Callable[[], Call]:
    """Parse a completion request; return a function that makes a job of each prompt."""
    request = decode_json(body, COMPLETION_DECODER)
    settings, info = exchange.context.settings, exchange.context.ready().info
    is_compat = settings.tgi_compat
    limits = Limits.of(settings, is_tgi=is_compat)
    if request.prompt is None:
        _check_without_prompt(request, is_compat=is_compat)
    check_common(request, limits, info, is_compat=is_compat)
    n = request.n or 1
    num_prompts = len(_listed(request.prompt)[0])
    if request.suffix:
        _check_suffix(request, is_compat=is_compat)
    best_of = _check_own(request, limits, num_prompts, n)
    exchange.is_large |= num_prompts > MANY_JOBS
    return partial(_call, request, exchange, best_of)


def _call(request: CompletionRequest, exchange: Exchange, best_of: int) -> Call:
    settings, info = exchange.context.settings, exchange.context.ready().info
    is_compat, n = settings.tgi_compat, request.n or 1
    # Selecting the best of several choices needs their log-probabilities.
    logprobs = 0 if request.logprobs is None and best_of > n else request.logprobs
    if request.echo and request.logprobs is not None and info.encoder_decoder is not None:
        refuse_field("echo", "cannot show log-probabilities: an encoder-decoder computes none of its prompt")
    hides_tokens = request.max_tokens == 0  # 0 asks only for scores: one token is sampled, and hidden
    common = dataclasses.replace(
        job_of(request, Text(""), info, settings, logprobs=logprobs, constraint=constraint_of(request)),
        n=best_of,
        max_tokens=1 if hides_tokens else request.max_tokens,
        default_max_tokens=None if is_compat else _DEFAULT_TOKENS,
        prompt_logprobs=request.logprobs if request.echo else None,
    )
    sampling, jobs = common.sampling, []
    for prompt in _prompts(request, info.vocab_size, may_be_empty=not is_compat):
        if request.seed is None:  # otherwise equal prompts of a call would get equal answers
            sampling = dataclasses.replace(sampling, seed=random_seed())
        jobs.append(dataclasses.replace(common, prompt=prompt, sampling=sampling))

    def render(generation: Generation) -> Renderer:
        names = TokenNames(generation.served.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        k = request.logprobs
        choices = [
            TextChoice(
                tracker=None if k is None else CompletionLogprobs(names, k, job.prompt.text or ""),
                echo=job.prompt.echo,
                # TGI's words, which only its streams use; its client accepts no null.
                stop_word="stop_sequence" if is_compat and request.stream else "stop",
                unfinished="" if is_compat else None,
            )
            for job in generation.jobs
            for _ in range(n)
        ]
        return CompletionRenderer(
            generation, request, choices, is_compat=is_compat, hides_tokens=hides_tokens
        )

    return Call(jobs=jobs, render=render, model=request.model, stream=bool(request.stream), is_sum=True)


def _check_without_prompt(request: CompletionRequest, *, is_compat: bool) -> None:
    """Refuse a request that has another API's field in place of the prompt; under compat, any."""
    check_renamed(request, {name: ("prompt", None) for name in ("messages", "input", "inputs")})
    if is_compat:
        refuse_field("prompt", "is required")


def _check_own(request: CompletionRequest, limits: Limits, num_prompts: int, n: int) -> int:
    """Check the fields that only completions have; return best_of."""
    if isinstance(thinking_budget(request), int):
        refuse_field(
            next(name for name in THINKING_BUDGETS if getattr(request, name) is not None),
            "is not supported: completions have no reasoning of their own",
            "unsupported_parameter",
        )
    if num_prompts > limits.prompts:
        message = f"Number of prompts exceeds the maximum allowed batch size of {limits.prompts}"
        raise TooManyPrompts(message, param="prompt")
    best_of = n if request.best_of is None else request.best_of
    if best_of < n:
        refuse_field("best_of", f"must be at least `n` ({n}), got {best_of}")
    if best_of > limits.best_of:
        refuse_field("best_of", f"must be at most {limits.best_of}, got {best_of}")
    if best_of > n and request.stream:
        refuse_field("best_of", "above `n` is not possible with `stream: true`")
    if num_prompts * best_of > limits.choices:
        refuse("n", f"Prompts times choices must be at most {limits.choices}, got {num_prompts * best_of}")
    if request.logprobs is not None and request.logprobs > limits.top_logprobs:
        refuse_field("logprobs", f"must be at most {limits.top_logprobs}, got {request.logprobs}")
    return best_of


def _check_suffix(request: CompletionRequest, *, is_compat: bool) -> None:
    """Refuse what has no meaning beside a suffix; under compat, any suffix."""
    if is_compat:
        message = "Suffix is not supported and can be achieved by preprocessing the prompt."
        raise UnsupportedSuffix(message, param="suffix")
    if request.truncate_prompt_tokens is not None:
        refuse_field("truncate_prompt_tokens", "and `suffix` exclude each other")
    if request.echo and request.logprobs is not None:
        refuse_field("echo", "cannot show log-probabilities of a prompt with a `suffix`")


def _listed(prompt: str | list[Any] | None) -> tuple[Sequence[Any], bool]:
    """Return the prompts, and whether the client sent a list of several; a list of ids is one prompt."""
    prompt = "" if prompt is None else prompt
    if not prompt and isinstance(prompt, list):
        refuse_field("prompt", "must not be empty")
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return ([prompt], False) if is_one else (prompt, True)


def _prompts(request: CompletionRequest, vocab_size: int, *, may_be_empty: bool) -> Iterator[Text]:
    prompts, is_list = _listed(request.prompt)
    for i, item in enumerate(prompts):
        field: Field = ("prompt", i) if is_list else ("prompt",)
        path = OPENAI.field_name(field)
        if type(item) is not type(prompts[0]):
            refuse_field(path, "must be of the same type as `prompt[0]`")
        if not isinstance(item, str | list):
            refuse_field(path, "must be a string or a list of token ids")
        if isinstance(item, list):
            if request.suffix:
                refuse_field(path, "must be text if there is a `suffix`")
            check_ids(item, path, vocab_size)
        yield Text(
            item,
            # Null means the default, and by default completions add the tokenizer's BOS.
            adds_special_tokens=request.add_special_tokens is not False,
            needs_text=bool(request.echo) or request.logprobs is not None,
            echoes=bool(request.echo),
            shows_special_tokens=request.skip_special_tokens is False,
            may_be_empty=may_be_empty,
            suffix=request.suffix or "",
            field=field,
        )
