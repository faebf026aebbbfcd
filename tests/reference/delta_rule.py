"""Float64 reference for heads of the gated delta rule, token by token: slow and plain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tests.reference.layers import double
from tgi_asgi.ops import DeltaRuleWeight


def delta_rule(rows: Tensor, steps: Tensor, weight: DeltaRuleWeight) -> Tensor:
    """Return the results [n_tokens, heads * head_dim] float64 for a sequence from its first token on."""
    heads, keys, size = weight.num_heads, weight.num_key_heads, weight.key_dim
    parts = rows.double().split([keys * size, keys * size, weight.width], 1)
    queries, of_keys = (_of_heads(part.view(len(rows), keys, size), weight) for part in parts[:2])
    values = parts[2].view(len(rows), heads, -1)
    rates, decays = steps.double().split(heads, 1)
    decays = torch.exp(double(weight.a) * softplus(decays + double(weight.dt_bias)))
    state = torch.zeros(heads, size, weight.head_dim, dtype=torch.float64)
    out = []
    for token in range(len(rows)):
        query, key = queries[token] * size**-0.5, of_keys[token]
        state = decays[token][:, None, None] * state
        found = torch.einsum("hk,hkv->hv", key, state)
        change = torch.sigmoid(rates[token])[:, None] * (values[token] - found)
        state = state + key[:, :, None] * change[:, None, :]
        out.append(torch.einsum("hk,hkv->hv", query, state))
    return torch.stack(out).flatten(1)


def _of_heads(keys: Tensor, weight: DeltaRuleWeight) -> Tensor:
    """Normalise keys [n_tokens, key heads, key_dim] to unit length and repeat them for each head."""
    keys = keys / (keys.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    times = weight.num_heads // weight.num_key_heads
    return keys.repeat(1, times, 1) if weight.is_tiled else keys.repeat_interleave(times, 1)
