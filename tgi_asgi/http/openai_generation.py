"""Put a `/v1` request together for the engine, once its prompt is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.openai_length import room_for, tgi_room_for
from tgi_asgi.http.openai_params import stop_of
from tgi_asgi.http.openai_schema import CommonRequest
from tgi_asgi.types import GenerationRequest, ModelInfo, SamplingParams

if TYPE_CHECKING:
    from tgi_asgi.text.constrain.grammar import Grammar


def generation_of(
    exchange: Exchange,
    request: CommonRequest,
    sampling: SamplingParams,
    ids: list[int],
    *,
    n: int,
    max_tokens: int | None,
    default_max_tokens: int | None,
    field: str,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
    shows_special: bool = False,
) -> GenerationRequest:
    """Check the lengths of one prompt and its answer, and return the engine's request.

    Args:
        default_max_tokens: where the client gave none; None fills the context.
        shows_special: special tokens give text, whatever the client asks for.
        field: `messages` or `prompt`, for the error that says what is too long.

    Raises:
        InvalidRequest: they do not fit into the context, or `min_tokens` not into `max_tokens`.
    """
    context = exchange.context
    info = context.ready().info
    ids = _truncated(ids, request.truncate_prompt_tokens, info, max_tokens)
    if context.settings.tgi_compat:
        budget = tgi_room_for(info, len(ids), max_tokens)
    else:
        budget = room_for(info, len(ids), max_tokens, field=field, default=default_max_tokens)
    return GenerationRequest(
        request_id=exchange.request_id,
        prompt_ids=ids,
        sampling=sampling,
        stop=stop_of(request, budget, shows_special=shows_special),
        n=n,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
        grammar=grammar,
        prompt_logprobs=prompt_logprobs,
        is_prefix_cached=prompt_logprobs is None,
    )


def _truncated(ids: list[int], keep: int | None, info: ModelInfo, max_tokens: int | None) -> list[int]:
    """Return the last `keep` ids; -1 keeps as many as the context has room for."""
    if keep is None:
        return ids
    if keep == -1:
        keep = max(min(info.max_total_tokens - (max_tokens or 1), info.max_input_tokens), 1)
    return ids[-keep:]
