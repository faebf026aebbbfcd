"""How many tokens a `/v1` request may generate: the context's arithmetic and its famous error message."""

from __future__ import annotations

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.types import ModelInfo

CODE = "context_length_exceeded"
# TGI tests the room for at most this many new tokens, and then generates until the context is full.
_TGI_TESTED_TOKENS = 1024


def room_for(
    info: ModelInfo, num_prompt: int, max_tokens: int | None, *, field: str, default: int | None
) -> int:
    """Return the token budget of a prompt; an absent `max_tokens` is cut to the context, a given one is not.

    Args:
        field: `messages` or `prompt`: what the client would have to shorten.
        default: the budget where `max_tokens` is None; None fills the context.

    Raises:
        InvalidRequest: prompt, or prompt and `max_tokens`, exceed the context.
    """
    context = info.max_total_tokens
    room = context - num_prompt
    if room < 1:
        raise _too_long(f"{context} tokens", f"your {field} resulted in {num_prompt} tokens", field)
    if num_prompt > info.max_input_tokens:
        most = f"{context} tokens, of which a prompt may take {info.max_input_tokens}"
        raise _too_long(most, f"your {field} resulted in {num_prompt} tokens", field)
    if max_tokens is None:
        return room if default is None else min(room, default)
    if max_tokens > room:
        parts = f"{num_prompt} in the {field}, {max_tokens} in the completion"
        asked = f"you requested {num_prompt + max_tokens} tokens ({parts})"
        raise _too_long(f"{context} tokens", asked, field, f"{field} or completion")
    return max_tokens


def tgi_room_for(info: ModelInfo, num_prompt: int, max_tokens: int | None) -> int:
    """Return the token budget by TGI's rule: what passes its test is cut at the end of the context.

    Raises:
        InvalidRequest: the prompt is too long, or leaves no room for the first 1,024 tokens asked for.
    """
    room = max(info.max_total_tokens - num_prompt, 0)
    tested = min(room if max_tokens is None else max_tokens, _TGI_TESTED_TOKENS)
    if num_prompt + tested > info.max_total_tokens:
        raise InvalidRequest(
            f"`inputs` tokens + `max_new_tokens` must be <= {info.max_total_tokens}. "
            f"Given: {num_prompt} `inputs` tokens and {tested} `max_new_tokens`",
            param="max_tokens",
        )
    if num_prompt > info.max_input_tokens:
        raise InvalidRequest(
            f"`inputs` must have less than {info.max_input_tokens} tokens. Given: {num_prompt}",
            param="inputs",
        )
    return room if max_tokens is None else min(max_tokens, room)


def _too_long(limit: str, given: str, field: str, what: str | None = None) -> InvalidRequest:
    # LiteLLM looks for the first phrase, LangChain for the code, which exception texts otherwise lack.
    return InvalidRequest(
        f"This model's maximum context length is {limit}. However, {given}. "
        f"Please reduce the length of the {what or field}. ({CODE})",
        param=field,
        code=CODE,
    )
