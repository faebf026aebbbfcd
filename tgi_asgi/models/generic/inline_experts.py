"""Experts of Llama 4, whose code multiplies all tokens by all experts: only the chosen ones are computed.

A token's row is multiplied by its score before its expert, not after it, so the row is given to the native
experts as scaled, with a weight of one:

    scores = [0.9, 0, 0, 0.4]      rows = [0.9 x, 0.4 x]     experts 0 and 3, whose results are added
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


def adapt_experts(model: Any, *, is_gguf: bool) -> None:
    """Let a model's experts be replaced by native ones (`experts.py`), and its layers call these.

    Args:
        is_gguf: Whether the weights come from a GGUF file, whose experts have a row for each output; those
            of checkpoints have a column.
    """
    for module in model.modules():
        kind = type(module)
        if kind.__name__ == "Llama4TextMoe" and kind.__module__.startswith("transformers."):
            experts = module.experts
            experts.has_gate, experts.has_bias, experts.is_transposed = True, False, not is_gguf
            if is_gguf:
                for name in ("gate_up_proj", "down_proj"):
                    turned = getattr(experts, name).transpose(1, 2)
                    setattr(experts, name, nn.Parameter(turned, requires_grad=False))
                experts.forward = functools.partial(_forward_by_rows, experts)
            experts._apply_gate = functools.partial(_apply_gate, experts)
            module.forward = functools.partial(_forward, module, module.forward)


def _apply_gate(experts: Any, rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    combined: Tensor = up * experts.act_fn(gate)
    return combined


def _forward_by_rows(experts: Any, hidden_states: Tensor) -> Tensor:
    """Replace the `forward` of experts whose matrices are turned, which shows what layers keep."""
    rows = hidden_states.view(experts.num_experts, -1, experts.hidden_size)
    combined = experts._apply_gate(torch.bmm(rows, experts.gate_up_proj.transpose(1, 2)))
    return torch.bmm(combined, experts.down_proj.transpose(1, 2)).view(-1, experts.hidden_size)


def _forward(module: Any, own: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Replace the `forward` of a layer's experts: the sum [n_tokens, hidden], and the router's logits."""
    native = module.experts.__dict__.get("tgi_experts")
    if native is None:  # not loaded yet
        found: tuple[Tensor, Tensor] = own(hidden_states)
        return found
    rows = hidden_states.reshape(-1, module.hidden_dim)
    scores, logits = module.router(rows)
    chosen = torch.topk(logits, module.top_k, dim=1).indices
    scaled = rows[:, None] * scores.gather(1, chosen)[..., None]
    ones = torch.ones(chosen.numel(), 1, dtype=rows.dtype, device=rows.device)
    routed = native.forward(
        module.experts, scaled.reshape(-1, module.hidden_dim), chosen.reshape(-1, 1), ones
    )
    return module.shared_expert(rows) + routed.reshape(scaled.shape).sum(dim=1), logits
