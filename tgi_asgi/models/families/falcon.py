"""TII's Falcon: parallel attention and MLP, one or few KV heads; the first models use ALiBi instead.

Sources: Almazrouei et al., The Falcon Series of Open Language Models, arXiv 2311.16867, section 4; Penedo et
al., The RefinedWeb Dataset, arXiv 2306.01116, section 4.1.
"""

from __future__ import annotations

from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.models.alibi import alibi_slopes
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.fused import FusedWeights, rows_by_group
from tgi_asgi.models.layer_spec import LayerSpec
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.layers import ParallelLayer
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import LLAMA_NAMES, num_layers, read_biases, read_layers, read_sizes


def read_falcon(reader: Reader, architecture: str) -> ModelConfig:
    """Read the configuration of 7B, of the "new decoder" (40B, 180B and 11B), or of the RW models."""
    reader.drop(*LLAMA_NAMES)
    reader.rename(
        hidden_size=("n_embed",),
        num_hidden_layers=("n_layer",),
        num_attention_heads=("n_head",),
        num_key_value_heads=("num_kv_heads", "n_head_kv"),
        intermediate_size=("ffn_hidden_size",),
        hidden_act=("activation",),
        layer_norm_eps=("layer_norm_epsilon",),
    )
    reader.defaults(
        intermediate_size=4 * reader.integer("hidden_size"),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    # 11B's file has the ratio of the MLP's width, which `transformers` does not read, and the width itself.
    reader.ignore("apply_residual_connection_post_layernorm", "ff_factor")
    # The first files of 40B do not name the kind of decoder, but its KV heads.
    is_new = reader.flag("new_decoder_architecture", reader.get("n_head_kv") is not None)
    is_parallel = reader.flag("parallel_attn", True)
    check(is_parallel or not is_new, "parallel_attn must be true with new_decoder_architecture")
    num_norms = reader.integer("num_ln_in_parallel_attn", 2 if is_new else 1)
    if reader.is_gguf:
        num_norms = 2 if "blk.0.attn_norm_2.weight" in reader.tensors else 1
    else:
        most = 2 if is_new else 1
        check(1 <= num_norms <= most, f"num_ln_in_parallel_attn must be 1..{most}, got {num_norms}")
    sizes = read_sizes(reader, activation="gelu", eps="layer_norm_eps", default_eps=1e-5)
    if not is_new and not reader.is_gguf and reader.flag("multi_query", True):
        sizes["num_kv_heads"] = 1
    return ModelConfig(
        architecture=architecture,
        layers=_read_layers(reader, sizes),
        has_gate=False,
        has_layer_norm=True,
        has_norm_bias=True,
        is_parallel=is_parallel,
        has_mlp_norm=num_norms == 2 or not is_parallel,
        **read_biases(reader, qkv="bias", output="bias", mlp="bias"),
        **sizes,
    )


def _read_layers(reader: Reader, sizes: dict[str, Any]) -> tuple[LayerSpec, ...]:
    """Read rotary positions, or ALiBi slopes, which Falcon also multiplies by the attention scale."""
    if not reader.flag("alibi", False):
        return read_layers(reader, sizes)
    reader.ignore("rope_parameters", "rope_theta", "rope_scaling")
    scale = sizes["head_dim"] ** -0.5
    slopes = tuple(slope * scale for slope in alibi_slopes(sizes["num_heads"]))
    return (LayerSpec(None, None, scale, slopes=slopes),) * num_layers(reader)


class FalconLayer(ParallelLayer):
    """A layer of the new decoder, with one or two norms of the same residual."""

    def make_norms(self, weights: LayerWeights) -> None:
        """Read the weights of the layer's norms."""
        if not self.config.has_mlp_norm:
            super().make_norms(weights)
            return
        self.attention_norm, self.mlp_norm = weights.norm("ln_attn"), weights.norm("ln_mlp")


class Falcon(Decoder):
    """The decoder with Falcon's names and its order of q, k and v."""

    parallel_class = FalconLayer
    weights_class = FusedWeights
    checkpoint = CheckpointLayout(
        names={
            "model.embed_tokens": "transformer.word_embeddings",
            "model.layers": "transformer.h",
            "model.norm": "transformer.ln_f",
            "self_attn.qkv_proj": "self_attention.query_key_value",
            "self_attn.o_proj": "self_attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        row_order=rows_by_group,
    )


_GGUF_NAMES = {"ln_attn": "attn_norm_2", "ln_mlp": "attn_norm"}
# The second is the name in TII's own code.
FAMILIES = (
    Family("FalconForCausalLM", "falcon", read_falcon, Falcon, gguf_names=_GGUF_NAMES),
    Family("RWForCausalLM", "falcon", read_falcon, Falcon, gguf_names=_GGUF_NAMES),
)
