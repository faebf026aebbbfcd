"""OLMo 2: norms behind attention and MLP instead of before them, and over the full width of q and of k.

Source: OLMo et al., 2 OLMo 2 Furious, arXiv 2501.00656, section 2.
"""

from __future__ import annotations

from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder, Layer, LayerWeights
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes


def read_olmo2(reader: Reader, architecture: str) -> ModelConfig:
    """Read OLMo 2's."""
    reader.defaults(rms_norm_eps=1e-5)
    sizes = read_sizes(reader)
    qkv_bias, output_bias = read_biases(reader, "attention_bias", "attn_q", "attn_output")
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes),
        has_qkv_bias=qkv_bias,
        has_output_bias=output_bias,
        has_qk_norm=True,
        **sizes,
    )


class Olmo2Weights(LayerWeights):
    """A layer whose norms of queries and keys are of all heads together."""

    def norms(self) -> ops.HeadNorms:
        """Return the two norms, each of a product's full width."""
        config = self.config
        query = self.norm("self_attn.q_norm", config.num_heads * config.head_dim)
        key = self.norm("self_attn.k_norm", config.num_kv_heads * config.head_dim)
        return ops.HeadNorms(query, key, is_whole=True)


class Olmo2Layer(Layer):
    """A layer whose parts read the residual itself, and add the norm of what they make."""

    def make_norms(self, weights: LayerWeights) -> None:
        """Take the weights of the norms behind the parts."""
        self.attention_norm = weights.norm("post_attention_layernorm")
        self.mlp_norm = weights.norm("post_feedforward_layernorm")

    def forward(self, x: ops.Value, cache: ops.Cache) -> ops.Value:
        """Add attention and MLP to the residual x [n_tokens, hidden]."""
        rows = ops.linear(self.attend(ops.activation(x), cache), self.output)
        x = ops.norm_add(rows, self.attention_norm, x)
        a = self.activate(ops.activation(x))
        return ops.norm_add(ops.linear(a, self.down), self.mlp_norm, x)


class Olmo2(Decoder):
    """The decoder with such layers."""

    layer_class = Olmo2Layer
    weights_class = Olmo2Weights


FAMILIES = (
    Family(
        "Olmo2ForCausalLM",
        "olmo2",
        read_olmo2,
        Olmo2,
        gguf_names={
            "post_attention_layernorm": "post_attention_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
    ),
)
