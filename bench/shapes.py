"""Models of random weights in shapes that benchmarks need and for which there is no small download.

`bench.kernels --shape 1b-q8_0`: Llama 3.2 1B's layers, with SmolLM2's vocabulary, in the formats that
llama.cpp would use, or as GPTQ's 4-bit codes in groups of 128 columns. The time of a product does not depend
on the values.
"""

from __future__ import annotations

import functools

import numpy as np

from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.layer_spec import LayerSpec, RopeSpec
from tgi_asgi.models.loading import WHOLE

_LAYERS = 16
SHAPES = (
    "1b-q8_0", "1b-q4_k_m", "1b-iq3_xxs", "1b-iq2_xs",
    "1b-gptq", "1b-gptq-act-order", "1b-gptq-act-order-decoded",
)  # fmt: skip
_GROUP = 128


def load_shape(name: str, packing: ops.Packing, positions: int) -> tuple[ModelConfig, Decoder]:
    """Make the model of a shape."""
    layer = LayerSpec(RopeSpec(64, 500000.0), None, 64**-0.5)
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=49152, hidden_size=2048, intermediate_size=8192,
        num_heads=32, num_kv_heads=8, head_dim=64, context_length=8192, norm_eps=1e-5,
        layers=(layer,) * _LAYERS, has_tied_embeddings=True,
    )  # fmt: skip
    return config, Decoder(config, RandomWeights(name.removeprefix("1b-")), packing, positions)


class RandomWeights:
    """Weights that are made on request."""

    num_bytes, is_gguf = 0, False

    def __init__(self, file_type: str) -> None:
        self._file_type = file_type

    def __contains__(self, name: object) -> bool:
        return True

    def get(self, name: str, shape: tuple[int, ...], part: slice = WHOLE) -> ops.WeightSource:
        """Return random rows, or a norm's weight of ones."""
        assert part == WHOLE, "no shape has experts"
        if len(shape) == 1:
            return _random("F32", 1, shape[0])
        if self._file_type.startswith("gptq") and ".layers." in name:
            source = _gptq(name.split(".")[-2], "act-order" in self._file_type, *shape)
            return source.in_order() if self._file_type.endswith("decoded") else source
        if self._file_type.startswith("iq") and ".layers." in name:
            return _random(self._file_type.upper(), *shape)
        return _random("Q8_0" if self._file_type == "q8_0" else _k_format(name), *shape)

    def unread(self) -> list[str]:
        """Return none."""
        return []

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return nothing: there is no file."""
        return {}

    def close(self) -> None:
        """Do nothing."""


def _k_format(name: str) -> str:
    """Return the format that llama.cpp's Q4_K_M gives a tensor: six bits where they matter most."""
    if name.startswith(("model.embed", "lm_head")):
        return "Q6_K"
    if not name.endswith(("v_proj.weight", "down_proj.weight")):
        return "Q4_K"
    layer, eighth = int(name.split(".")[2]), _LAYERS // 8
    is_more = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
    return "Q6_K" if is_more else "Q4_K"


@functools.cache
def _gptq(product: str, has_order: bool, rows: int, columns: int) -> ops.WeightSource:
    """Return 4-bit codes; matrices of one input have one order of columns."""
    random = np.random.default_rng(rows)
    shape = rows, columns // _GROUP
    inputs = {"o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
    order = np.random.default_rng(inputs.get(product, 0)).permutation(columns) if has_order else None
    codes = random.integers(0, 256, (rows, columns // 2), np.uint8)
    zeros = np.full(shape, 8, np.uint8)
    source = ops.integer_source(codes, np.full(shape, 2.0**-8, np.float32), zeros, 4, order)
    assert source is not None
    return source


@functools.cache
def _random(format: str, rows: int, columns: int) -> ops.WeightSource:
    from tests.support.random_weights import random_weight

    made = random_weight(format, rows, columns, seed=rows + columns)
    return ops.WeightSource(made.data, format, (columns,)) if rows == 1 else made
