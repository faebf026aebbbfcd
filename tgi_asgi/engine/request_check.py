"""Checks that a request can run in this engine at all; otherwise it would wait forever, or stop others."""

from __future__ import annotations

from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.runner.plan import RunnerTraits
from tgi_asgi.types import GenerationRequest


def check_request(
    request: GenerationRequest, max_total_tokens: int, traits: RunnerTraits, scheduler: Scheduler
) -> None:
    """Check a request's tokens and images against the model's context, a step, and the KV cache.

    Args:
        max_total_tokens: Maximum number of tokens of prompt and answer.

    Raises:
        InvalidRequest: if it could never run, or would hurt others if it did.
    """
    prompt, max_tokens = request.prompt_ids, request.stop.max_tokens
    if not prompt:
        raise InvalidRequest("a prompt is one or more token ids")
    if max_tokens < 1 or request.n < 1:
        raise InvalidRequest(f"max_tokens and n must be at least 1, got {max_tokens} and {request.n}")
    _check_images(request, traits, scheduler)
    if request.pooling is not None:
        max_tokens = 0  # nothing is sampled
    if len(prompt) + max_tokens > max_total_tokens:
        raise InvalidRequest(
            f"prompt and max_tokens must not exceed {max_total_tokens} tokens together, "
            f"got {len(prompt)} + {max_tokens}",
            code="context_length_exceeded",
        )
    # The last sampled token is never computed.
    _check_cache_fits(request, len(prompt) + max(max_tokens - 1, 0), traits, scheduler)


def _check_images(request: GenerationRequest, traits: RunnerTraits, scheduler: Scheduler) -> None:
    """Raise if images lie outside the prompt, or one does not fit a step."""
    num_tokens, end = len(request.prompt_ids), 0
    for image in request.images:
        if image.start < end or image.num_tokens < 1:
            raise InvalidRequest("the images of a prompt must lie in it in order, each with a token")
        end = image.start + image.num_tokens
    if end > num_tokens:
        raise InvalidRequest(f"an image ends at token {end} of a prompt of {num_tokens}")
    at_once = scheduler.chunk_boundaries.min_step_tokens(request.images, num_tokens)
    step_tokens = traits.max_step_tokens - traits.max_batch_size
    if at_once and at_once > step_tokens:
        raise InvalidRequest(
            f"the model must compute {at_once} tokens of the prompt at once, but a step has "
            f"{step_tokens} (--max-batch-prefill-tokens)",
            code="context_length_exceeded",
        )


def _check_cache_fits(
    request: GenerationRequest, num_tokens: int, traits: RunnerTraits, scheduler: Scheduler
) -> None:
    """Raise if a sequence with `num_tokens` computed tokens needs more than the whole KV cache."""
    needs, num_blocks = scheduler.tables.needs, traits.num_blocks
    needed = needs.total_for(num_tokens)
    if request.needs_all:
        needed = max(needed, needs.total_for(len(request.prompt_ids), keeps_all=True))
    if needed > num_blocks:
        raise InvalidRequest(
            f"prompt and max_tokens need {needed * needs.block_size} tokens of KV cache, which has "
            f"{num_blocks * needs.block_size}",
            code="context_length_exceeded",
        )
