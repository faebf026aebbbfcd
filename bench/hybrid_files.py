"""The layers of published models with gated delta nets or latent attention, for `bench.moe_files` to write.

The formats are those that llama.cpp's Q4_K_M assigns to each tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
Tensors = dict[str, tuple[str, Shape]]


@dataclass(frozen=True, slots=True)
class DeltaModel:
    """Qwen3.5, dense: a gated delta net in all layers except every fourth, and tied embeddings."""

    name = "qwen35"
    num_experts = top_k = 1
    num_layers: int
    vocab_size: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    size: int  # of the MLP
    delta_heads: int
    delta_key_heads: int
    delta_dim: int

    def ends(self, vocab_size: int) -> Tensors:
        """Return format and shape of the tensors before and after the layers."""
        norm = ("F32", (self.hidden,))
        return {"token_embd.weight": ("Q6_K", (vocab_size, self.hidden)), "output_norm.weight": norm}

    def layer(self, index: int, *, has_more: bool) -> Tensors:
        """Return format and shape of a layer's tensors; `has_more`: the layer gets more bits."""
        hidden, size, more = self.hidden, self.size, "Q6_K" if has_more else "Q4_K"
        found: Tensors = {
            "attn_norm.weight": ("F32", (hidden,)), "post_attention_norm.weight": ("F32", (hidden,)),
            "ffn_gate.weight": ("Q4_K", (size, hidden)), "ffn_up.weight": ("Q4_K", (size, hidden)),
            "ffn_down.weight": (more, (hidden, size)),
        }  # fmt: skip
        if index % 4 == 3:
            queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
            return found | {
                "attn_q.weight": ("Q4_K", (2 * queries, hidden)), "attn_k.weight": ("Q4_K", (keys, hidden)),
                "attn_v.weight": (more, (keys, hidden)), "attn_output.weight": ("Q4_K", (hidden, queries)),
                "attn_q_norm.weight": ("F32", (self.head_dim,)),
                "attn_k_norm.weight": ("F32", (self.head_dim,)),
            }  # fmt: skip
        heads, values = self.delta_heads, self.delta_heads * self.delta_dim
        channels = values + 2 * self.delta_key_heads * self.delta_dim
        return found | {
            "attn_qkv.weight": (more, (channels, hidden)), "attn_gate.weight": ("Q4_K", (values, hidden)),
            "ssm_beta.weight": ("Q4_K", (heads, hidden)), "ssm_alpha.weight": ("Q4_K", (heads, hidden)),
            "ssm_conv1d.weight": ("F32", (channels, 4)), "ssm_dt.bias": ("F32", (heads,)),
            "ssm_a": ("F32", (heads,)), "ssm_norm.weight": ("F32", (self.delta_dim,)),
            "ssm_out.weight": ("Q4_K", (hidden, values)),
        }  # fmt: skip

    def numbers(self) -> dict[str, Any]:
        """Return the model's sizes for the file's metadata."""
        return {
            "feed_forward_length": self.size, "attention.head_count": self.num_heads,
            "attention.head_count_kv": self.num_kv_heads, "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim, "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.freq_base": 1e7, "rope.dimension_count": self.head_dim // 4,
            "rope.dimension_sections": [11, 11, 10, 0], "full_attention_interval": 4,
            "ssm.conv_kernel": 4, "ssm.state_size": self.delta_dim, "ssm.group_count": self.delta_key_heads,
            "ssm.time_step_rank": self.delta_heads, "ssm.inner_size": self.delta_heads * self.delta_dim,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class LatentModel:
    """GLM 4.7 Flash, and other models with DeepSeek V3's layers: the first layer is dense."""

    name = "deepseek2"
    num_layers: int
    vocab_size: int
    hidden: int
    num_heads: int
    query_rank: int
    rank: int
    key_dim: int  # of a head, without its rotated part
    rotary_dim: int
    value_dim: int
    dense_size: int
    num_experts: int
    top_k: int
    size: int  # of an expert, and of the shared one
    scale: float

    def ends(self, vocab_size: int) -> Tensors:
        """Return format and shape of the tensors before and after the layers."""
        shape = (vocab_size, self.hidden)
        norm = ("F32", (self.hidden,))
        return {
            "token_embd.weight": ("Q4_K", shape), "output_norm.weight": norm, "output.weight": ("Q6_K", shape)
        }  # fmt: skip

    def layer(self, index: int, *, has_more: bool) -> Tensors:
        """Return format and shape of a layer's tensors; `has_more`: the layer gets more bits."""
        hidden, heads, more = self.hidden, self.num_heads, "Q6_K" if has_more else "Q4_K"
        found: Tensors = {
            "attn_norm.weight": ("F32", (hidden,)), "ffn_norm.weight": ("F32", (hidden,)),
            "attn_q_a.weight": ("Q4_K", (self.query_rank, hidden)),
            "attn_q_a_norm.weight": ("F32", (self.query_rank,)),
            "attn_q_b.weight": ("Q4_K", (heads * (self.key_dim + self.rotary_dim), self.query_rank)),
            "attn_kv_a_mqa.weight": ("Q4_K", (self.rank + self.rotary_dim, hidden)),
            "attn_kv_a_norm.weight": ("F32", (self.rank,)),
            # Its rows are not a multiple of Q4_K's block.
            "attn_k_b.weight": ("Q5_0", (heads, self.rank, self.key_dim)),
            "attn_v_b.weight": ("Q4_K", (heads, self.value_dim, self.rank)),
            "attn_output.weight": ("Q4_K", (hidden, heads * self.value_dim)),
        }  # fmt: skip
        if index == 0:
            dense = (self.dense_size, hidden)
            return found | {
                "ffn_gate.weight": ("Q4_K", dense), "ffn_up.weight": ("Q4_K", dense),
                "ffn_down.weight": (more, dense[::-1]),
            }  # fmt: skip
        shape, count = (self.size, hidden), self.num_experts
        return found | {
            "ffn_gate_inp.weight": ("F32", (count, hidden)), "exp_probs_b.bias": ("F32", (count,)),
            "ffn_gate_exps.weight": ("Q4_K", (count, *shape)), "ffn_gate_shexp.weight": ("Q4_K", shape),
            "ffn_up_exps.weight": ("Q4_K", (count, *shape)), "ffn_up_shexp.weight": ("Q4_K", shape),
            "ffn_down_exps.weight": (more, (count, *shape[::-1])),
            "ffn_down_shexp.weight": (more, shape[::-1]),
        }  # fmt: skip

    def numbers(self) -> dict[str, Any]:
        """Return the model's sizes for the file's metadata."""
        return {
            "feed_forward_length": self.dense_size, "attention.head_count": self.num_heads,
            "attention.head_count_kv": 1, "attention.key_length": self.rank + self.rotary_dim,
            "attention.value_length": self.rank, "attention.q_lora_rank": self.query_rank,
            "attention.kv_lora_rank": self.rank,
            "attention.key_length_mla": self.key_dim + self.rotary_dim,
            "attention.value_length_mla": self.value_dim, "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 1e6, "rope.dimension_count": self.rotary_dim, "leading_dense_block_count": 1,
            "expert_count": self.num_experts, "expert_used_count": self.top_k,
            "expert_feed_forward_length": self.size, "expert_shared_count": 1, "expert_gating_func": 2,
            "expert_weights_scale": self.scale, "expert_weights_norm": True,
        }  # fmt: skip


HYBRIDS: dict[str, DeltaModel | LatentModel] = {
    "qwen3.5-4b": DeltaModel(
        32, 248320, 2560, 16, 4, 256, 9216, delta_heads=32, delta_key_heads=16, delta_dim=128
    ),
    "glm-4.7-flash": LatentModel(
        47, 154880, 2048, 20, 768, 512, 192, 64, 256, 10240, num_experts=64, top_k=4, size=1536, scale=1.8
    ),
}
