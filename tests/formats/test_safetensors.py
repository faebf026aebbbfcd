"""The safetensors reader: against the reference writer, and against inconsistent headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import read_json
from tgi_asgi.formats.safetensors import SafetensorsFile
from tgi_asgi.formats.weight_files import Checkpoint

GOOD = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def encode(header: Any, data: bytes = bytes(16), *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def changed(**fields: Any) -> bytes:
    return encode({"a": {**GOOD["a"], **fields}})


def two(first: list[int], second: list[int], data: bytes = bytes(16)) -> bytes:
    entries = {
        name: {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
        for name, (start, stop) in {"a": first, "b": second}.items()
    }
    return encode(entries, data)


def test_what_the_reference_writes_is_read(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f16": np.arange(4, dtype=np.float16),
        "scalar": np.array(7, dtype=np.int64),
        "none": np.zeros((0, 4), dtype=np.float32),
    }
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile.open(tmp_path / "model.safetensors")
    assert file.metadata == {"format": "pt"}
    assert {name: (info.dtype, info.shape) for name, info in file.tensors.items()} == {
        "f32": ("F32", (2, 3)),
        "f16": ("F16", (4,)),
        "scalar": ("I64", ()),
        "none": ("F32", (0, 4)),
    }
    for name, array in arrays.items():
        assert file.raw(name).tobytes() == array.tobytes(), name


def test_views_outlive_the_file_and_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(encode(GOOD, bytes(range(16))))
    file = SafetensorsFile.open(tmp_path / "a.safetensors")
    view = file.raw("a")
    file.close()
    assert view.tobytes() == bytes(range(16))
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0


BAD_HEADERS = {
    "short": (b"abc", "it has 3 bytes"),
    "length past the end": (encode(GOOD, length=2**63), "claims 9223372036854775808 bytes"),
    "length one too far": (encode(GOOD, b"", length=len(json.dumps(GOOD)) + 1), "claims"),
    "not JSON": (encode(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (encode(b'{"\xff": 1}'), "not valid JSON"),
    "not an object": (encode(b"[1]"), "expected a JSON object, got list"),
    "too deep": (encode(b'{"a":' + b"[" * 100_000), "nests too deep"),
    "too many items": (encode(b'{"a":[' + b"0," * 2_000_001), "more than 2000000 items"),
    "number": (encode(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "NaN": (encode(b'{"a": NaN}'), "NaN is not JSON"),
    "same name": (encode(b'{"a": 1, "a": 2}'), "'a' is given twice"),
    "metadata": (encode({"__metadata__": {"a": 1}}, b""), "`__metadata__` must map"),
    "long name": (encode({"n" * 1025: GOOD["a"]}), "1025 characters"),
    "entry": (encode({"a": []}), "must have dtype, shape"),
    "no shape": (encode({"a": {"dtype": "F32", "data_offsets": [0, 16]}}), "must have dtype, shape"),
    "dtype": (changed(dtype="F31"), "unknown dtype 'F31'"),
    "dtype of another type": (changed(dtype=["F32"]), "unknown dtype ['F32']"),
    "negative size": (changed(shape=[-2, -2]), "impossible shape"),
    "fraction": (changed(shape=[2.0, 2]), "impossible shape"),
    "boolean": (changed(shape=[True, 4]), "impossible shape"),
    "huge product": (changed(shape=[2**40, 2**40]), "impossible shape"),
    "rank": (changed(shape=[1] * 17), "impossible shape"),
    "wrong size": (changed(shape=[2, 3]), "takes 24 bytes, but its offsets [0, 16] span 16"),
    "half a byte": (changed(dtype="F4", shape=[31]), "takes 15.5 bytes"),
    "offsets": (changed(data_offsets=[0]), "impossible offsets"),
    "offsets of text": (changed(data_offsets=["0", "16"]), "impossible offsets"),
    "negative offset": (changed(data_offsets=[-16, 0]), "impossible offsets"),
    "reversed": (changed(data_offsets=[16, 0]), "span -16"),
    "past the end": (changed(data_offsets=[16, 32]), "but the file ends at"),
    "overlap": (two([0, 10], [8, 16]), "'a' and 'b' overlap"),
    "same bytes": (two([0, 16], [0, 16]), "'a' and 'b' overlap"),
    "hole": (two([0, 6], [8, 16]), "2 bytes after the header belong to no tensor"),
    "tail": (encode(GOOD, bytes(17)), "1 bytes after the header belong to no tensor"),
}


@pytest.mark.parametrize(("data", "reason"), BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_a_header_that_lies_is_refused_with_the_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelLoadError) as caught:
        SafetensorsFile.open(tmp_path / "model.safetensors")
    assert reason in str(caught.value)
    assert "model.safetensors: " in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = encode(GOOD)
    for size in range(1, len(data)):
        (tmp_path / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(ModelLoadError):
            SafetensorsFile.open(tmp_path / "model.safetensors")


def make_shards(directory: Path) -> dict[str, Any]:
    save_file({"a": np.ones(2, np.float32)}, directory / "model-00001-of-00002.safetensors")
    save_file({"b": np.zeros(3, np.float16)}, directory / "model-00002-of-00002.safetensors")
    index = {
        "metadata": {"total_size": 14},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_sharded_checkpoint_is_one_set_of_tensors(tmp_path: Path) -> None:
    make_shards(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint) == ["a", "b"] and "a" in checkpoint
    assert checkpoint.tensor("b").shape == (3,)
    assert checkpoint.raw("a").view("<f4").tolist() == [1, 1]
    with pytest.raises(ModelLoadError, match="no tensor 'c'"):
        checkpoint.raw("c")


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_a_single_file_is_found(tmp_path: Path, name: str) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / name)
    assert list(Checkpoint.open(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a\\b.safetensors",
        ".safetensors",
        "x.bin",
        7,
        None,
        "x\0.safetensors",
    ],
)
def test_an_index_cannot_name_a_file_outside_the_directory(tmp_path: Path, name: Any) -> None:
    index = make_shards(tmp_path)
    index["weight_map"]["a"] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"not a plain \.safetensors name"):
        Checkpoint.open(tmp_path)


def test_what_the_index_omits_is_there_as_well(tmp_path: Path) -> None:
    """Check that no tensor is silently skipped; the loader refuses tensors that no model reads."""
    make_shards(tmp_path)
    arrays = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32), "c": np.ones(2, np.float32)}
    save_file(arrays, tmp_path / "model-00001-of-00002.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(checkpoint) == ["a", "b", "c"]
    assert checkpoint.tensor("b").dtype == "F16", "the index decides which of two files has the tensor"


def test_an_index_that_contradicts_the_shards_is_refused(tmp_path: Path) -> None:
    index = make_shards(tmp_path)
    index["weight_map"]["c"] = index["weight_map"]["a"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelLoadError, match=r"no file has the tensor 'c', which model\.safetensors\.index\.json names"
    ):
        Checkpoint.open(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="no such file"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ModelLoadError, match="`weight_map` must be"):
        Checkpoint.open(tmp_path)


def test_a_tensor_is_found_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    index = make_shards(tmp_path)
    index["weight_map"] = dict(zip("ab", reversed(index["weight_map"].values()), strict=True))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint.open(tmp_path).tensor("b").shape == (3,)


def test_shards_without_an_index_are_a_checkpoint_if_they_are_all_there(tmp_path: Path) -> None:
    make_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert sorted(Checkpoint.open(tmp_path)) == ["a", "b"]
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelLoadError, match=r"'a' is both in .*00001-of-00002.* and .*00002-of-00002"):
        Checkpoint.open(tmp_path)
    save_file({"c": np.ones(2, np.float32)}, tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(ModelLoadError, match=r"has 3 \.safetensors files and no model"):
        Checkpoint.open(tmp_path)


def test_a_single_file_goes_before_an_index_of_others(tmp_path: Path) -> None:
    make_shards(tmp_path)
    save_file({"whole": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    assert list(Checkpoint.open(tmp_path)) == ["whole"]


def test_second_copies_and_adapters_are_no_weights(tmp_path: Path) -> None:
    for name in ("gptq_model-4bit", "consolidated", "adapter_model"):
        save_file({name: np.ones(2, np.float32)}, tmp_path / f"{name}.safetensors")
    assert list(Checkpoint.open(tmp_path)) == ["gptq_model-4bit"]


def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234567\n"
    (tmp_path / "model.safetensors").write_text(text)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is a Git LFS pointer.*`git lfs pull`"):
        Checkpoint.open(tmp_path)


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelLoadError, match="never read"):
        Checkpoint.open(tmp_path)
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"a": np.ones(2, np.float32)}, tmp_path / name)
    with pytest.raises(ModelLoadError, match=r"has 2 \.safetensors files"):
        Checkpoint.open(tmp_path)


def test_a_json_file_is_read_or_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": Infinity}')  # some models' configurations contain it
    assert read_json(path) == {"a": float("inf")}
    for text, reason in [("[]", "got list"), ("{", "not valid JSON"), ("[" * 100_000, "too deep")]:
        path.write_text(text)
        with pytest.raises(ModelLoadError, match=rf"config\.json: .*{reason}"):
            read_json(path)
