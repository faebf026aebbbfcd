"""What all answers of one `/v1` request have in common: identity, usage, finish reasons."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tgi_asgi.errors import NotFound
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.openai_schema import CommonRequest
from tgi_asgi.types import Channel, FinishReason, ModelInfo, TokenEvent

_FINISH = {FinishReason.LENGTH: "length", FinishReason.EOS: "stop", FinishReason.STOP: "stop"}


@dataclass(slots=True)
class Answer:
    """One answer's identity, equal in all chunks of a stream, and its token counts.

    `prompts` are the prompts' ids, one a channel; `channels` is the exchange's list, which fills when the
    request starts.
    """

    id: str
    model: str
    created: int
    fingerprint: str
    n: int  # choices a prompt
    prompts: Sequence[Sequence[int]]
    channels: list[Channel]
    is_compat: bool
    shows_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echoes: Sequence[str] = ()  # by prompt: text to put before each of its choices
    num_reasoning: Callable[[], int] = int  # reasoning tokens so far, over all choices
    hides_tokens: bool = False  # max_tokens was 0: the one token that was sampled is not shown

    @classmethod
    def of(
        cls,
        exchange: Exchange,
        request: CommonRequest,
        info: ModelInfo,
        prefix: str,
        prompts: Sequence[Sequence[int]],
        **options: Any,
    ) -> Answer:
        stream_options = request.stream_options
        include_usage = bool(stream_options and stream_options.include_usage)
        return cls(
            id=f"{prefix}-{request.request_id or secrets.token_hex(12)}",
            model=served_name(exchange, request.model, info),
            created=int(time.time()),
            fingerprint=info.fingerprint,
            n=request.n or 1,
            prompts=prompts,
            channels=exchange.channels,
            is_compat=exchange.context.settings.tgi_compat,
            shows_token_ids=bool(request.return_token_ids),
            include_usage=include_usage,
            continuous_usage=include_usage and bool(stream_options and stream_options.continuous_usage_stats),
            **options,
        )

    def usage(self, num_generated: int) -> dict[str, Any]:
        """Return the usage object after `num_generated` tokens over all choices."""
        num_prompt = sum(map(len, self.prompts))
        if self.hides_tokens:
            num_generated = 0
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {
                "cached_tokens": sum(channel.stats.cached_tokens for channel in self.channels)
            },
            "completion_tokens_details": {"reasoning_tokens": self.num_reasoning()},
        }


def finish_of(event: TokenEvent) -> str:
    """Return OpenAI's word for the end of a choice."""
    assert event.finish is not None
    return _FINISH[event.finish]


def served_name(exchange: Exchange, requested: str | None, info: ModelInfo) -> str:
    """Return the model name to answer with: the one asked for, or the served model's own.

    Raises:
        NotFound: names are strict and this one is not served.
    """
    if requested is None or requested == "tgi":
        return info.model_id
    if requested != info.model_id and requested not in info.aliases:
        if exchange.context.settings.strict_model_names:
            raise model_not_found(requested)
        exchange.context.note_unknown_model(requested)
    return requested


def model_not_found(name: str) -> NotFound:
    """Return the error for a model that is not served."""
    return NotFound(f"The model '{name}' does not exist.", param="model", code="model_not_found")
