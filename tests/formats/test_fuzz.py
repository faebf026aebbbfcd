"""Mutated files are read or refused without a crash, and without more memory than the file's size."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.support.gguf_bytes import Tensor, gguf_bytes
from tests.support.hypothesis_examples import for_all
from tests.support.scale import Scale
from tgi_asgi import _C
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.safetensors import SafetensorsFile
from tgi_asgi.text.tokenizer import Tokenizer

EXAMPLES = (300, 20_000)
# Memory that reading may use beyond the file's size: Python objects for a few hundred bytes of header.
MEMORY_BYTES = 1 << 20

GGUF = gguf_bytes(
    {
        "general.architecture": "llama",
        "general.alignment": 32,
        "a.bool": True,
        "a.strings": ["x", "yy", ""],
        "a.numbers": np.arange(5, dtype="<i4"),
        "a.nested": [[1, 2], [3]],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<|end|>"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": np.array([1, 1, 1, 3], "<i4"),
        "tokenizer.ggml.eos_token_id": 3,
    },
    [
        Tensor("token_embd.weight", (32, 4), 8, bytes(136)),
        Tensor("blk.0.norm.weight", (32,), 0, bytes(128)),
        Tensor("blk.0.attn_q.weight", (256, 2), 14, bytes(420)),
    ],
)
_HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
).encode()
SAFETENSORS = struct.pack("<Q", len(_HEADER)) + _HEADER + bytes(32)

# Replacements for numbers: bounds of the integer types, and small values.
NUMBERS = st.sampled_from([0, 1, 2, 7, 8, 9, 255, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1])


@st.composite
def mutated(draw: st.DrawFn, original: bytes) -> bytes:
    """Change a few places: a byte, a whole number, a cut, a removal, a repetition."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.integers(0, 5)):
            case 0:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                data[at : at + 8] = struct.pack("<Q", draw(NUMBERS))
            case 2:
                data[at : at + 4] = struct.pack("<I", draw(NUMBERS) & 0xFFFFFFFF)
            case 3:
                del data[at:]
            case 4:
                del data[at : at + draw(st.integers(1, 16))]
            case 5:
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


def read_gguf(path: Path) -> None:
    file = GgufFile.open(path)
    for name, info in file.tensors.items():
        with np.errstate(all="ignore"):
            values = _C.decode_rows(file.raw(name), info.type, info.shape[-1])
            assert values.size == math.prod(info.shape)
    Tokenizer.from_gguf(file.metadata).encode("ab <|end|>", add_special_tokens=True)


def read_safetensors(path: Path) -> None:
    file = SafetensorsFile.open(path)
    for name, info in file.tensors.items():
        assert file.raw(name).size == info.nbytes


def read_or_refuse(read: Callable[[Path], None], path: Path, data: bytes) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    try:
        read(path)
    except ModelLoadError as error:
        assert str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 32 * len(data) + MEMORY_BYTES


def test_a_mutated_gguf_file_is_read_or_refused(scale: Scale, tmp_path: Path) -> None:
    @for_all(scale(*EXAMPLES), mutated(GGUF))
    def check(data: bytes) -> None:
        read_or_refuse(read_gguf, tmp_path / "model.gguf", data)


def test_a_mutated_safetensors_file_is_read_or_refused(scale: Scale, tmp_path: Path) -> None:
    @for_all(scale(*EXAMPLES), mutated(SAFETENSORS))
    def check(data: bytes) -> None:
        read_or_refuse(read_safetensors, tmp_path / "model.safetensors", data)


@pytest.mark.parametrize(("read", "data"), [(read_gguf, GGUF), (read_safetensors, SAFETENSORS)])
def test_the_files_that_are_mutated_are_right(
    tmp_path: Path, read: Callable[[Path], None], data: bytes
) -> None:
    (tmp_path / "file").write_bytes(data)
    read(tmp_path / "file")
