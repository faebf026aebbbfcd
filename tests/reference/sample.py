"""Float64 reference for the distribution that tokens are sampled from, with full sorts: slow and plain."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tgi_asgi.types import SamplingParams


def penalised(
    logits: Tensor,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    banned: Sequence[int] = (),
) -> Tensor:
    """Apply penalties, bias and bans to one row of logits."""
    x = logits.double().clone()
    for token in set(prompt_ids) | set(output_ids):
        factor = params.repetition_penalty
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    for token in set(output_ids):
        count = list(output_ids).count(token)
        x[token] -= params.frequency_penalty * count + params.presence_penalty
    for token, bias in params.logit_bias:
        x[token] += bias if bias > -100 else -math.inf
    for token in banned:
        x[token] = -math.inf
    return x


def probabilities(x: Tensor, params: SamplingParams) -> Tensor:
    """Return each token's probability, given its logit after penalties."""
    x = x / params.temperature
    if params.top_k:
        least = x.sort(descending=True).values[: params.top_k][-1]
        x = x.masked_fill(x < least, -math.inf)
    if params.top_p < 1:
        p, order = x.softmax(0).sort(descending=True)
        last = int((p.cumsum(0) < params.top_p).sum())
        x = x.masked_fill(x < x[order[min(last, len(x) - 1)]], -math.inf)
    if params.min_p > 0:
        p = x.softmax(0)
        x = x.masked_fill(p < params.min_p * p.max(), -math.inf)
    if params.typical_p < 1:
        p = x.softmax(0)
        information = -p.log()
        entropy = (p * information).nan_to_num(0).sum()
        shift, order = (information - entropy).abs().sort()
        last = int((p[order].cumsum(0) < params.typical_p).sum())
        kept = (information - entropy).abs() <= shift[min(last, len(x) - 1)]
        x = x.masked_fill(~kept, -math.inf)
    return x.softmax(0)
