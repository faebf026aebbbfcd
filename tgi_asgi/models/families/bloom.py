"""BigScience's BLOOM: positions by ALiBi, and a LayerNorm after the embedding.

Source: Le Scao et al., BLOOM, arXiv 2211.05100, section 3.2.
"""

from __future__ import annotations

from tgi_asgi import ops
from tgi_asgi.models.alibi import alibi_slopes
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.fused import FusedWeights, rows_by_group
from tgi_asgi.models.layer_spec import LayerSpec
from tgi_asgi.models.layer_tensors import read_norm
from tgi_asgi.models.loading import Weights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import LLAMA_NAMES, num_layers, read_sizes


def read_bloom(reader: Reader, architecture: str) -> ModelConfig:
    """Read BLOOM's configuration; ALiBi has no limit, so the context is the length of its training."""
    reader.drop(*LLAMA_NAMES)
    reader.rename(
        hidden_size=("n_embed",),
        num_hidden_layers=("n_layer",),
        num_attention_heads=("n_head",),
        max_position_embeddings=("seq_length",),
        layer_norm_eps=("layer_norm_epsilon",),
    )
    # The defaults of transformers' class, small as they are, for files that lack the keys.
    reader.defaults(vocab_size=250880, hidden_size=64, num_hidden_layers=2, num_attention_heads=8)
    reader.defaults(
        intermediate_size=4 * reader.integer("hidden_size"),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    reader.ignore("offset_alibi", "skip_bias_add", "skip_bias_add_qkv")  # only about training
    reader.require(apply_residual_connection_post_layernorm=False)
    sizes = read_sizes(reader, activation="gelu_tanh", eps="layer_norm_eps", default_eps=1e-5)
    layer = LayerSpec(None, None, sizes["head_dim"] ** -0.5, slopes=alibi_slopes(sizes["num_heads"]))
    return ModelConfig(
        architecture=architecture,
        layers=(layer,) * num_layers(reader),
        has_qkv_bias=True,
        has_output_bias=True,
        has_mlp_bias=True,
        has_gate=False,
        has_layer_norm=True,
        has_norm_bias=True,
        **sizes,
    )


class Bloom(Decoder):
    """The decoder with a norm after its embedding."""

    weights_class = FusedWeights
    checkpoint = CheckpointLayout(
        names={
            "model.embed_tokens": "transformer.word_embeddings",
            "model.embed_norm": "transformer.word_embeddings_layernorm",
            "model.layers": "transformer.h",
            "model.norm": "transformer.ln_f",
            "self_attn.qkv_proj": "self_attention.query_key_value",
            "self_attn.o_proj": "self_attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        row_order=rows_by_group,
    )

    def __init__(
        self, config: ModelConfig, weights: Weights, arithmetic: ops.Arithmetic, max_positions: int
    ) -> None:
        super().__init__(config, weights, arithmetic, max_positions)
        self.embedding_norm = read_norm(config, weights, "model.embed_norm")

    def embed(self, batch: ops.RecordedBatch) -> ops.Value:
        """Return the residual stream that enters the first layer."""
        return ops.norm_in_place(super().embed(batch), self.embedding_norm)


FAMILIES = (
    Family(
        "BloomForCausalLM", "bloom", read_bloom, Bloom, gguf_names={"model.embed_norm": "token_embd_norm"}
    ),
)
