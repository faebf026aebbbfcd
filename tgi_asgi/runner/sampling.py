"""What the `sample` operator drew, as the plain values that the engine reads."""

from __future__ import annotations

from collections.abc import Sequence

from tgi_asgi.ops import SampleResult
from tgi_asgi.runner.plan import Sampled


def unpack(result: SampleResult) -> list[Sampled]:
    """Turn the result's tensors into one `Sampled` a row, on the runner's thread."""
    ids: list[int] = result.token_ids.tolist()
    are_finite: list[bool] = result.is_finite.tolist()
    logprobs: list[float] = result.logprobs.tolist()
    tops = unpack_top(result.top_ids.tolist(), result.top_logprobs.tolist(), result.num_top.tolist())
    return [
        # NaN, which alone differs from itself: the slot wants no log-probabilities, or the row has none.
        Sampled(token_id, logprob, top, is_finite)
        if logprob == logprob
        else Sampled(token_id, is_finite=is_finite)
        for token_id, is_finite, logprob, top in zip(ids, are_finite, logprobs, tops, strict=True)
    ]


def unpack_top(
    ids: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]], counts: Sequence[int]
) -> list[list[tuple[int, float]]]:
    """Pair each row's first `counts` ids with their log-probabilities."""
    return [
        list(zip(row_ids[:count], row_logprobs[:count], strict=True))
        for row_ids, row_logprobs, count in zip(ids, logprobs, counts, strict=True)
    ]
