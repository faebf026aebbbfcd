"""How much one request may ask for: TGI's and OpenAI's limits, the administrator's, the context length."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from tgi_asgi.api.parse import refuse_field
from tgi_asgi.errors import ContextExceeded, InvalidRequest
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.settings import Settings

MAX_STOP_CHARS = 1024  # per stop string: matching holds back up to that much text
MAX_IDS = 1024  # of logit_bias and of stop_token_ids: each costs time in every step
MAX_TOOLS = 1024  # per request; agents send about 200, and 100,000 occupy a thread for a minute
MAX_CHOICES = 128  # per request, over all its prompts
# TGI checks that at most this many new tokens fit, and then generates until the context is full.
TGI_TESTED_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one API's requests: TGI's or OpenAI's by default, overridden by the administrator."""

    best_of: int
    stops: int
    top_logprobs: int
    prompts: int
    choices: int  # prompts times n

    @classmethod
    def of(cls, settings: Settings, *, is_tgi: bool = False) -> Limits:
        """Return the limits of `/v1`, or of the native routes and the compatible mode."""
        best_of, stops, top_logprobs, prompts = (2, 4, 5, 4) if is_tgi else (MAX_CHOICES, 16, 20, MAX_CHOICES)
        return cls(
            best_of=min(settings.max_best_of or best_of, MAX_CHOICES),
            stops=stops if settings.max_stop_sequences is None else settings.max_stop_sequences,
            top_logprobs=top_logprobs if settings.max_top_n_tokens is None else settings.max_top_n_tokens,
            prompts=min(settings.max_client_batch_size or prompts, MAX_CHOICES),
            choices=min(MAX_CHOICES, settings.max_concurrent_requests),
        )


class Overflow(enum.Enum):
    """What happens if a prompt and the requested tokens do not fit into the context together."""

    REFUSED = "refused"
    CLIPPED = "clipped"  # the answer ends with the context
    TGI = "tgi"  # clipped, if the first 1,024 tokens fit

    def budget(self, info: ModelInfo, num_prompt: int, max_tokens: int | None, default: int | None) -> int:
        """Return how many tokens a prompt's answer may have.

        Args:
            max_tokens: Requested number of tokens.
            default: Number if none was requested; None fills the context.

        Raises:
            ContextExceeded: if the prompt, or the prompt with the requested tokens, does not fit.
            InvalidRequest: the same, in TGI's wording.
        """
        if self is Overflow.TGI:
            return _tgi_budget(info, num_prompt, max_tokens)
        context = info.max_total_tokens
        available = _available(info, num_prompt)
        if available < 1 or num_prompt > info.max_input_tokens:
            raise _prompt_too_long(f"{num_prompt} tokens", num_prompt, info)
        if max_tokens is None:
            return available if default is None else min(available, default)
        if max_tokens > available and self is Overflow.REFUSED:
            if available < context - num_prompt:
                message = f"`{{field}}` must be at most {available}, the longest answer of this model"
                raise InvalidRequest(message, field=("max_tokens",))
            raise _answer_too_long(num_prompt, max_tokens, info)
        return min(max_tokens, available)


def bounded_priority(priority: int, settings: Settings) -> int:
    """Return a request's priority within the bounds of `--max-priority`."""
    return min(max(priority, -settings.max_priority), settings.max_priority)


def check_stops(stops: tuple[str, ...], max_stops: int, param: str, *, is_list: bool = True) -> None:
    """Check the number of stop strings and their lengths."""
    if len(stops) > max_stops:
        refuse_field(param, f"takes at most {max_stops} strings, got {len(stops)}")
    for i, stop in enumerate(stops):
        where = f"{param}[{i}]" if is_list else param
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            refuse_field(where, f"must have 1 to {MAX_STOP_CHARS} characters, got {len(stop)}")


def check_characters(num_characters: int, longest_token: int, info: ModelInfo) -> None:
    """Refuse a text that is too long however it is tokenised, before spending time on it.

    Raises:
        ContextExceeded: if the text is too long.
    """
    num_tokens = -(-num_characters // max(longest_token, 1))
    if num_tokens > info.max_input_tokens:
        raise _prompt_too_long(f"{num_tokens} tokens or more", num_tokens, info)


def _tgi_budget(info: ModelInfo, num_prompt: int, max_tokens: int | None) -> int:
    available = max(_available(info, num_prompt), 0)
    tested = min(available if max_tokens is None else max_tokens, TGI_TESTED_TOKENS)
    if num_prompt + tested > info.max_total_tokens:
        raise InvalidRequest(
            f"`inputs` tokens + `max_new_tokens` must be <= {info.max_total_tokens}. "
            f"Given: {num_prompt} `inputs` tokens and {tested} `max_new_tokens`",
            field=("max_tokens",),
        )
    if num_prompt > info.max_input_tokens:
        raise tgi_too_long(info, str(num_prompt))
    return available if max_tokens is None else min(max_tokens, available)


def _available(info: ModelInfo, num_prompt: int) -> int:
    """Return how many tokens an answer may have; below 1 if the prompt does not fit."""
    available, pair = info.max_total_tokens - num_prompt, info.encoder_decoder
    return available if pair is None or pair.max_answer is None else min(available, pair.max_answer)


def tgi_too_long(info: ModelInfo, num_tokens: str) -> InvalidRequest:
    """Return the refusal of a prompt that is too long, in TGI's wording."""
    message = f"`inputs` must have less than {info.max_input_tokens} tokens. Given: {num_tokens}"
    return InvalidRequest(message, field=("prompt",))


def _prompt_too_long(given: str, num_tokens: int, info: ModelInfo) -> ContextExceeded:
    limit = f"{info.max_total_tokens} tokens"
    if num_tokens < info.max_total_tokens:
        limit += f", of which a prompt may take {info.max_input_tokens}"
    return _too_long(limit, f"your {{field}} resulted in {given}", num_tokens, info)


def _answer_too_long(num_prompt: int, max_tokens: int, info: ModelInfo) -> ContextExceeded:
    # vLLM's words, with OpenAI's in brackets: from these numbers, agents compute how much they may ask for.
    asked = (
        f"you requested {max_tokens} output tokens and your prompt contains at least {num_prompt} input "
        f"tokens, for a total of at least {num_prompt + max_tokens} tokens "
        f"({num_prompt} in the {{field}}, {max_tokens} in the completion)"
    )
    shorten = "input prompt or the number of requested output tokens"
    return _too_long(f"{info.max_total_tokens} tokens", asked, num_prompt, info, shorten)


def _too_long(
    limit: str, given: str, num_tokens: int, info: ModelInfo, what: str = "{field}"
) -> ContextExceeded:
    # LiteLLM looks for the first phrase, Qwen Code for both numbers, LangChain for the code, which exception
    # texts otherwise lack, and Copilot for the words after it, which `/v1/responses` of OpenAI uses.
    return ContextExceeded(
        f"This model's maximum context length is {limit}. However, {given}. "
        f"Please reduce the length of the {what}. "
        "(context_length_exceeded: your input exceeds the context window of this model)",
        num_tokens,
        info.max_input_tokens,
    )
