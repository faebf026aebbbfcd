"""GGUF files with queries, keys and values in one tensor, as converters of 2023 and 2024 wrote some families.

llama.cpp reads either form for any family (`create_tensor_qkv`): rows of queries, of keys, then of values.
"""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tests.support.checkpoints import our_logits
from tests.support.families import CASES
from tests.support.family_files import gguf_file
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles

BY_NAME = {case.name: case for case in CASES}
IDS = torch.randint(0, 160, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def join(source: Path, target: Path, names: str = "qkv") -> ModelFiles:
    """Copy a file with the tensors of these parts joined."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "")
    writer.kv_data = [{}]
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    parts: dict[str, list[np.ndarray]] = {}
    for tensor in reader.tensors:
        found = re.fullmatch(rf"(blk\.\d+\.attn_)[{names}](\.weight|\.bias)", tensor.name)
        name = f"{found[1]}qkv{found[2]}" if found else tensor.name
        order = "qkv".index(tensor.name[len(found[1])]) if found else 0
        parts.setdefault(name, [np.zeros(0)] * 3)[order] = tensor.data
    for name, data in parts.items():
        writer.add_tensor(name, np.concatenate([each for each in data if each.size]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles("joined", None, "gguf", target)


@pytest.mark.parametrize("name", ["llama", "phi", "glm", "qwen2", "qwen3"])
def test_joined_tensors_are_read_as_the_three_are(name: str, tmp_path: Path) -> None:
    apart = gguf_file(BY_NAME[name], "f32")
    joined = join(apart.path, tmp_path / "joined.gguf")
    torch.testing.assert_close(our_logits(joined, IDS), our_logits(apart, IDS), rtol=0, atol=0)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    joined = join(gguf_file(BY_NAME["qwen2"], "f32").path, tmp_path / "joined.gguf", names="qk")
    with pytest.raises(ModelLoadError, match=r"blk\.0\.attn_qkv.weight"):
        our_logits(joined, IDS)
