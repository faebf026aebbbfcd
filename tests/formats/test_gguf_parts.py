"""A model in several GGUF files, as the `gguf` package's writer splits it: read as one or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.support.checkpoints import make_model, our_logits, reference_logits, save_gguf
from tests.support.gguf_bytes import Tensor, gguf_bytes, write
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.sources import ModelFiles

ARRAYS = {f"t{index}": np.full((2, 32), index, np.float32) for index in range(5)}


def write_parts(folder: Path, stem: str = "m", arrays: dict[str, Any] = ARRAYS, most: int = 2) -> list[Path]:
    """Write a model with at most `most` tensors in each file; return the files in order."""
    writer = gguf.GGUFWriter(folder / f"{stem}.gguf", "llama", split_max_tensors=most)
    writer.add_name(stem)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{stem}*.gguf"))


def refusal(path: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        GgufFile.open(path)
    return str(caught.value)


@pytest.mark.parametrize("named", [0, 1, 2])
def test_any_part_names_the_whole_model(tmp_path: Path, named: int) -> None:
    parts = write_parts(tmp_path)
    assert [part.name for part in parts] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    with GgufFile.open(parts[named]) as file:
        assert file.path == parts[0]
        assert file.metadata["general.name"] == "m"
        assert file.names == list(ARRAYS)
        for name, array in ARRAYS.items():
            assert file.raw(name).tobytes() == array.tobytes()


def test_a_model_in_parts_computes_what_it_does_in_one_file(tmp_path: Path) -> None:
    model = make_model()
    whole = save_gguf(model, tmp_path / "whole.gguf", "Q8_0")
    reader = gguf.GGUFReader(whole.path)
    writer = gguf.GGUFWriter(tmp_path / "cut.gguf", "llama", split_max_tensors=7)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("cut-*.gguf"))
    assert len(parts) > 3
    ids = list(range(1, 40))
    found = our_logits(ModelFiles("cut", None, "gguf", parts[1]), ids)
    assert found.equal(our_logits(whole, ids))
    assert (found - reference_logits(model, ids)).abs().max() < 1e-3


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    parts[2].unlink()
    assert f"{parts[2]} is missing, which is part of the same model as {parts[0]}" in refusal(parts[0])


def test_a_part_of_a_model_of_other_parts_is_named(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    (tmp_path / "other").mkdir()
    others = write_parts(tmp_path / "other", most=1)
    parts[1].write_bytes(others[1].read_bytes())
    assert refusal(parts[0]) == (
        f"{parts[1]} is named as part 2 of 3, but says that it is 2 of 5: of another model?"
    )
    parts[1].write_bytes(parts[2].read_bytes())
    assert f"{parts[1]} is named as part 2 of 3, but says that it is 3 of 3" in refusal(parts[0])


def test_parts_of_models_of_different_sizes_are_told_apart(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    (tmp_path / "other").mkdir()
    six = {**ARRAYS, "t5": ARRAYS["t0"]}
    parts[2].write_bytes(write_parts(tmp_path / "other", arrays=six)[2].read_bytes())
    assert refusal(parts[0]) == f"{parts[2]} is of a model of 6 tensors, but {parts[0]} of one of 5"


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    (tmp_path / "other").mkdir()
    turned = dict(reversed(ARRAYS.items()))
    parts[2].write_bytes(write_parts(tmp_path / "other", arrays=turned)[2].read_bytes())
    assert refusal(parts[0]) == f"tensor 't0' is both in {parts[0]} and in {parts[2]}"


def part_bytes(keys: dict[str, Any], tensors: int = 1) -> bytes:
    return gguf_bytes(keys, [Tensor(f"t{index}", [1], 0, bytes(4)) for index in range(tensors)])


@pytest.mark.parametrize(
    ("name", "keys", "reason"),
    [
        ("m-00001-of-00002.gguf", {}, r"named as part 1 of 2, but its metadata says nothing of parts"),
        ("m-00001-of-00002.gguf", {"split.count": 1}, "says that it is 1 of 1"),
        ("m-00001-of-00001.gguf", {"split.count": 2}, "is named as part 1 of 1, but says that it is 1 of 2"),
        (
            "m.gguf",
            {"split.count": 3, "split.no": 1},
            r"is part 2 of 3 .* such as model-00002-of-00003\.gguf",
        ),
        (
            "m-00000-of-00002.gguf",
            {"split.count": 2},
            "is part 1 of 2 of a model: the others can only be found",
        ),
        ("m.gguf", {"split.count": "2"}, "`split.count` must be an integer, got 2"),
    ],
)
def test_names_and_metadata_must_agree(tmp_path: Path, name: str, keys: dict[str, Any], reason: str) -> None:
    assert re.search(reason, refusal(write(tmp_path / name, part_bytes(keys))))


def test_the_number_of_tensors_must_be_what_the_parts_say(tmp_path: Path) -> None:
    for number in (1, 2):
        keys = {"split.count": 2, "split.no": number - 1, "split.tensors.count": 3}
        data = gguf_bytes(keys, [Tensor(f"t{number}", [1], 0, bytes(4))])
        write(tmp_path / f"m-0000{number}-of-00002.gguf", data)
    assert "says that its 2 parts have 3 tensors; they have 2" in refusal(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize("keys", [{}, {"split.count": 0}, {"split.count": 1, "split.no": 0}])
def test_a_single_part_is_a_file_like_others(tmp_path: Path, keys: dict[str, Any]) -> None:
    path = write(tmp_path / "m-00001-of-00001.gguf", part_bytes(keys, 2))
    assert GgufFile.open(path).names == ["t0", "t1"]
