"""Weights of a GGUF file: llama.cpp's names turned into canonical ones, and its order of rows undone."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from tgi_asgi.formats.gguf import GgufFile, GgufType
from tgi_asgi.formats.quants import dequantise
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.loading import check_shape
from tgi_asgi.models.registry import find_by_gguf_name
from tgi_asgi.ops import NATIVE_FORMATS, WeightSource

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "rope_freqs": "rope_freqs",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def gguf_name(name: str) -> str:
    """Translate a canonical name: model.layers.3.mlp.up_proj.weight is blk.3.ffn_up.weight."""
    stem, _, kind = name.rpartition(".")
    layer = _LAYER.fullmatch(stem)
    if layer:
        return f"blk.{layer[1]}.{_NAMES[layer[2]]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


class GgufWeights:
    """The `Weights` of an open GGUF file, which `close` closes."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._head_dim = config.head_dim
        family = find_by_gguf_name(file.metadata["general.architecture"])
        self._is_rotary_permuted = family.is_rotary_permuted
        self.num_bytes = sum(info.nbytes for info in file.tensors.values())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and gguf_name(name) in self._file.tensors

    def get(self, name: str, shape: tuple[int, ...]) -> WeightSource:
        """Return a tensor, as `Weights.get` says; formats that the kernels do not know come as float32."""
        info = self._file.tensor(gguf_name(name))
        check_shape(info.name, info.shape, shape)
        data, kind = self._file.raw(info.name), info.type
        if self._is_rotary_permuted and (".q_proj." in name or ".k_proj." in name):
            data = join_rotary_halves(data, shape[0], self._head_dim)
        if kind.name not in NATIVE_FORMATS:
            data, kind = dequantise(data, kind, shape).reshape(-1).view(np.uint8), GgufType.F32
        return WeightSource(data, kind.name, shape)

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()


def join_rotary_halves(data: npt.NDArray[np.uint8], num_rows: int, head_dim: int) -> npt.NDArray[np.uint8]:
    """Undo llama.cpp's permutation of query and key rows; returns a copy.

    A head's rows lie pair by pair in the file (0, d/2, 1, d/2 + 1, ...); the checkpoint's order, which the
    kernels take, has the first halves first. Rows are whole numbers of blocks: any format's bytes will do.
    """
    pairs = data.reshape(num_rows // head_dim, head_dim // 2, 2, data.size // num_rows)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)
