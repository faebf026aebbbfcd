"""What all that is told of one `/v1` answer has in common: identity, usage, finish reasons."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tgi_asgi.api.call import Generation
from tgi_asgi.api.openai.schema import CommonRequest
from tgi_asgi.settings import Settings
from tgi_asgi.types import FinishReason, TokenEvent

_FINISH = {FinishReason.LENGTH: "length", FinishReason.EOS: "stop", FinishReason.STOP: "stop"}


@dataclass(slots=True)
class Identity:
    """One answer's identity, equal in all chunks of a stream, and its token counts."""

    generation: Generation
    id: str
    created: int
    n: int  # choices a prompt
    is_compat: bool
    shows_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echoes: Sequence[str] = ()  # by prompt: text to put before each of its choices
    num_reasoning: Callable[[], int] = int  # reasoning tokens so far, over all choices
    hides_tokens: bool = False  # max_tokens was 0: the one token that was sampled is not shown

    @classmethod
    def of(
        cls, generation: Generation, request: CommonRequest, prefix: str, settings: Settings, **options: Any
    ) -> Identity:
        stream_options = request.stream_options
        include_usage = bool(stream_options and stream_options.include_usage)
        return cls(
            generation,
            id=f"{prefix}-{request.request_id or secrets.token_hex(12)}",
            created=int(time.time()),
            n=request.n or 1,
            is_compat=settings.tgi_compat,
            shows_token_ids=bool(request.return_token_ids),
            include_usage=include_usage,
            continuous_usage=include_usage and bool(stream_options and stream_options.continuous_usage_stats),
            **options,
        )

    def head(self, kind: str) -> dict[str, Any]:
        """Return what a chunk or a body begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.generation.model,
            "system_fingerprint": self.generation.info.fingerprint,
        }

    def prompt_ids(self, part: int) -> list[int]:
        """Return the tokens of a prompt."""
        return list(self.generation.jobs[part].request.prompt_ids)

    def usage(self, num_generated: int) -> dict[str, Any]:
        """Return the usage object after `num_generated` tokens over all choices."""
        num_prompt = self.generation.num_prompt_tokens
        if self.hides_tokens:
            num_generated = 0
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": self.generation.num_cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.num_reasoning()},
        }


def finish_of(event: TokenEvent) -> str:
    """Return OpenAI's word for the end of a choice."""
    assert event.finish is not None
    return _FINISH[event.finish]
