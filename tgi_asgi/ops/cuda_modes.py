"""How a CUDA device computes the steps of a model, where its kernels and libraries leave a choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tgi_asgi.ops.cuda_attention import PromptAttention


@dataclass(frozen=True, slots=True)
class CudaModes:
    """What kernels and libraries compute with.

    Attributes:
        dtype: Type of activations and weights, bfloat16 or float16; the residual and logits are float32.
        is_batch_invariant: Whether a token's results have the same bits whatever else is in the step.
        prompt_attention: What computes the attention of prompts, for the layers that it supports.
        has_float8_products: Whether steps of many tokens are multiplied in FP8 where weights are FP8.
        has_dependent_launches: Whether a kernel of a small step may begin before the previous one has ended.
    """

    dtype: torch.dtype = torch.bfloat16
    is_batch_invariant: bool = False
    prompt_attention: PromptAttention = PromptAttention.PAGED
    has_float8_products: bool = False
    has_dependent_launches: bool = False
