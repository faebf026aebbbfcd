"""Baichuan 1 and 2: Llama with one tensor of q, k and v; 13B has linear biases, and 2 a head of unit rows.

Source: Baichuan, Baichuan 2, arXiv 2309.10305, sections 2.3 and 2.4.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tgi_asgi import ops
from tgi_asgi.models.alibi import alibi_slopes
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.fused import FusedWeights
from tgi_asgi.models.layer_spec import LayerSpec
from tgi_asgi.models.loading import Weights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_layers, read_sizes

# No file says which positions the model uses. As in llama.cpp, the number of layers does: that of 7B, whose
# heads rotate, or of 13B, which has linear biases.
_LAYERS_WITH_ROPE, _LAYERS_WITH_SLOPES = 32, 40
# Nor does any say which Baichuan it is, except by its tokens: 64,000 of the first, 125,696 of the second.
_TOKENS_BETWEEN = 100_000
_CHUNK_ROWS = 4096  # of a head, in float32: 84 MB of 13B's


def read_baichuan(reader: Reader, architecture: str) -> ModelConfig:
    """Read the configuration of 7B or 13B; the latter's files call its context `model_max_length`."""
    reader.rename(max_position_embeddings=("model_max_length",))
    sizes, count = read_sizes(reader), num_layers(reader)
    check_computed(
        count in (_LAYERS_WITH_ROPE, _LAYERS_WITH_SLOPES),
        f"Baichuan is served with {_LAYERS_WITH_ROPE} layers, which have rotary positions, or "
        f"{_LAYERS_WITH_SLOPES}, which have linear biases, not with {count}",
    )
    if count == _LAYERS_WITH_ROPE:
        return ModelConfig(architecture=architecture, layers=read_layers(reader, sizes), **sizes)
    reader.ignore("rope.dimension_count", "rope_theta")  # of GGUF files
    layer = LayerSpec(None, None, sizes["head_dim"] ** -0.5, slopes=alibi_slopes(sizes["num_heads"]))
    return ModelConfig(architecture=architecture, layers=(layer,) * count, **sizes)


class Baichuan(Decoder):
    """The decoder with Baichuan's names, and Baichuan 2's head."""

    weights_class = FusedWeights
    checkpoint = CheckpointLayout(names={"self_attn.qkv_proj": "self_attn.W_pack"})

    def read_head_rows(self, weights: Weights) -> ops.WeightSource:
        """Return the head's matrix; whoever converts Baichuan 2 to GGUF must scale its rows first."""
        head = super().read_head_rows(weights)
        is_scaled = weights.is_gguf or self.config.vocab_size < _TOKENS_BETWEEN
        return head if is_scaled else ops.stack_rows(list(unit_rows(head)))


def unit_rows(head: ops.WeightSource) -> Iterator[ops.WeightSource]:
    """Yield a matrix in parts, with rows of the length 1, rounded as in the file, as by the model's code."""
    for start in range(0, head.shape[0], _CHUNK_ROWS):
        rows = ops.decode(head.rows(start, min(start + _CHUNK_ROWS, head.shape[0])))
        lengths = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
        rows = rows / np.maximum(lengths, np.float32(1e-12))
        if head.format == "BF16":
            yield ops.as_bfloat16(rows)
        else:
            yield ops.from_floats(rows.astype(np.float16) if head.format == "F16" else rows)


# The second is the name in the files of Baichuan 1 7B.
FAMILIES = tuple(
    Family(name, "baichuan", read_baichuan, Baichuan, is_rotary_permuted=True)
    for name in ("BaichuanForCausalLM", "BaiChuanForCausalLM")
)
