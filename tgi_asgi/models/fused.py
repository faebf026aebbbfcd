"""Layers with fused q, k and v, and fused gate and up: Phi 3's, and those of models older than Llama.

GGUF files of some of these have separate tensors; so have checkpoints that GPTQModel has taken apart.
"""

from __future__ import annotations

import numpy as np

from tgi_asgi.models.checkpoint import Rows
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.layer_tensors import Sources
from tgi_asgi.models.layer_weights import LayerWeights

_QKV = "self_attn.qkv_proj"


class FusedGateUpWeights(LayerWeights):
    """A layer whose gate and up are one tensor, unless the file has both."""

    def gate_up_sources(self) -> Sources:
        """Cut the tensor of gate and up by rows; in GGUF files it has the name of up."""
        if self.has("mlp.gate_proj.weight"):
            return super().gate_up_sources()
        rows = [self.config.intermediate_size] * 2
        return self.cut("mlp.gate_up_proj.weight", rows, self.config.hidden_size)


class FusedWeights(FusedGateUpWeights):
    """A layer in which all products of one input are one tensor, unless the file has each."""

    def qkv_sources(self) -> Sources:
        """Cut the tensor of q, k and v by rows."""
        if self.has("self_attn.q_proj.weight"):
            return super().qkv_sources()
        return self.cut(f"{_QKV}.weight", self._qkv_rows(), self.config.hidden_size)

    def qkv_biases(self) -> Sources | None:
        """Cut the bias of q, k and v by rows."""
        if self.has("self_attn.q_proj.bias"):
            return super().qkv_biases()
        return self.cut(f"{_QKV}.bias", self._qkv_rows()) if self.config.has_qkv_bias else None

    def _qkv_rows(self) -> list[int]:
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        return [count * config.head_dim for count in heads]


def rows_by_group(config: ModelConfig, module: str) -> Rows | None:
    """Return the row order for a tensor of q, k and v in which each KV head follows its query heads.

        q0 q1 k v | q2 q3 k v     in the file: rows of four query heads, two KV heads
        q0 q1 q2 q3 | k k | v v   as read

    A `CheckpointLayout.row_order`. With as many KV heads as query heads, each head's q, k and v are adjacent
    in the file.
    """
    if not module.endswith(_QKV):
        return None
    groups, per_group = config.num_kv_heads, config.num_heads // config.num_kv_heads + 2
    rows = np.arange(groups * per_group * config.head_dim).reshape(groups, per_group, config.head_dim)
    return np.concatenate([rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)])
