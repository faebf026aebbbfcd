"""The GGUF reader: what it reads, and that it refuses every inconsistent header."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from tests.support.gguf_bytes import Tensor, gguf_bytes, string, write
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.gguf_types import READ, name_of

F32, F16, Q4_1 = 0, 1, 3


def open_bytes(tmp_path: Path, data: bytes) -> GgufFile:
    return GgufFile.open(write(tmp_path / "model.gguf", data))


def refusal(tmp_path: Path, data: bytes) -> str:
    with pytest.raises(ModelLoadError) as caught:
        open_bytes(tmp_path, data)
    return str(caught.value)


def test_metadata_of_every_type_is_read(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {
        "text": "Grüße",
        "yes": True,
        "no": False,
        "u8": ("u8", 255),
        "i8": ("i8", -1),
        "i32": ("i32", -(2**31)),
        "u64": ("u64", 2**64 - 1),
        "float": 0.5,
        "strings": ["a", "", "ü"],
        "floats": np.array([1.5, -2.0], "<f4"),
        "nested": [[1, 2], [3]],
    }
    with open_bytes(tmp_path, gguf_bytes(metadata)) as file:
        read = dict(file.metadata)
    assert list(read.pop("strings")) == ["a", "", "ü"]
    assert read.pop("floats").tolist() == [1.5, -2.0]
    assert [part.tolist() for part in read.pop("nested")] == [[1, 2], [3]]
    for name, item in read.items():
        expected = metadata[name]
        expected = expected[1] if isinstance(expected, tuple) else expected
        assert item == expected and type(item) is type(expected), name


def test_version_2_is_read(tmp_path: Path) -> None:
    assert open_bytes(tmp_path, gguf_bytes({"a": 1}, version=2)).metadata == {"a": 1}


def test_tensors_have_numpy_order_and_their_own_bytes(tmp_path: Path) -> None:
    first, second = np.arange(6, dtype="<f4"), np.arange(40, dtype=np.uint8)
    tensors = [Tensor("a", (3, 2), F32, first.tobytes()), Tensor("b", (32, 2), Q4_1, second.tobytes())]
    file = open_bytes(tmp_path, gguf_bytes({}, tensors))
    assert file.tensors["a"].shape == (2, 3)
    assert file.tensors["b"].type == "Q4_1" and file.tensors["b"].nbytes == 40
    assert file.raw("a").tobytes() == first.tobytes()
    assert file.raw("b").tobytes() == second.tobytes()


def test_alignment_of_the_file_is_honoured(tmp_path: Path) -> None:
    data = [Tensor("a", (1,), F32, b"\1\2\3\4"), Tensor("b", (1,), F32, b"\5\6\7\10")]
    file = open_bytes(tmp_path, gguf_bytes({"general.alignment": 64}, data, alignment=64))
    assert file.raw("b").tobytes() == b"\5\6\7\10"


def test_views_outlive_the_file_and_cannot_be_written(tmp_path: Path) -> None:
    file = open_bytes(tmp_path, gguf_bytes({}, [Tensor("a", (1,), F32, b"\1\2\3\4")]))
    view = file.raw("a")
    file.close()
    file.close()
    assert view.tobytes() == b"\1\2\3\4"
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0


def _resident_kib(path: Path) -> int:
    """Return the resident size of a file's mapping in KiB."""
    maps = Path("/proc/self/smaps").read_text().split(str(path))[1:]
    return sum(int(part.split("Rss:")[1].split()[0]) for part in maps)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_a_closed_file_takes_no_memory_though_a_view_of_it_lives(tmp_path: Path) -> None:
    values = np.arange(1 << 18, dtype=np.float32)
    data = gguf_bytes({}, [Tensor("a", (1 << 18,), F32, values.tobytes())])
    with open_bytes(tmp_path, data) as file:
        view = file.raw("a")
        assert view.view(np.float32).tolist() == values.tolist()
        assert _resident_kib(tmp_path / "model.gguf") > 1000
    assert _resident_kib(tmp_path / "model.gguf") == 0
    assert view.view(np.float32).tolist() == values.tolist()


def test_types_that_are_not_read_have_names_for_people() -> None:
    for kind in GGMLQuantizationType:
        assert name_of(kind.value) == kind.name
    assert name_of(33) == "Q4_0_8_8"  # dropped by llama.cpp, and published
    assert name_of(4242) == "number 4242"
    known = {kind.value for kind in GGMLQuantizationType}
    assert all(READ[number].name == GGMLQuantizationType(number).name for number in READ if number in known)


def test_a_tensor_of_unknown_type_matters_only_when_it_is_wanted(tmp_path: Path) -> None:
    tensors = [Tensor("strange", (32,), 4242, bytes(32)), Tensor("known", (1,), F32, bytes(4))]
    file = open_bytes(tmp_path, gguf_bytes({}, tensors))
    assert file.raw("known").size == 4
    with pytest.raises(ModelLoadError, match="'strange' is of type number 4242, which is not supported"):
        file.raw("strange")
    with pytest.raises(ModelLoadError, match="no tensor 'absent'"):
        file.tensor("absent")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    metadata = {"text": "abc", "strings": ["x", "y"], "numbers": np.zeros(3, "<i4"), "nested": [[1], [2]]}
    data = gguf_bytes(metadata, [Tensor("a", (8,), F32, bytes(range(32)))])
    open_bytes(tmp_path, data)
    for size in range(1, len(data)):
        assert "model.gguf" in refusal(tmp_path, data[:size])


def typed(code: str, *items: Any) -> dict[str, Any]:
    """Return one metadata key `a` whose type and value are the packed items."""
    return {"a": struct.pack("<" + code, *items)}


def one(*dims: int, kind: int = F32, size: int = 16, offset: int | None = None) -> bytes:
    """Return a file with one tensor."""
    return gguf_bytes({}, [Tensor("a", dims, kind, bytes(size), offset)])


BAD_HEADERS = {
    "magic": (b"GGML" + bytes(60), "not a GGUF file"),
    "old version": (gguf_bytes(version=1), "of version 1"),
    "big-endian": (gguf_bytes(version=0x03000000), "big-endian"),
    "tensor count": (gguf_bytes(num_tensors=2**63), "9223372036854775808 tensors"),
    "key count": (gguf_bytes(num_keys=2**40), "1099511627776 metadata keys"),
    "value type": (gguf_bytes(typed("IQ", 13, 0)), "unknown type 13"),
    "element type": (gguf_bytes(typed("IIQ", 9, 13, 0)), "array of the unknown type 13"),
    "boolean": (gguf_bytes(typed("IB", 7, 2)), "boolean of value 2"),
    "boolean in array": (gguf_bytes(typed("IIQBB", 9, 7, 2, 1, 2)), "neither 0 nor 1"),
    "string length": (gguf_bytes(typed("IQ", 8, 2**63)), "needs 9223372036854775808 bytes"),
    "not UTF-8": (gguf_bytes(typed("IQH", 8, 2, 0xFFFF)), "`a` is not UTF-8"),
    "array size": (gguf_bytes(typed("IIQ", 9, 6, 2**62)), "needs 18446744073709551616 bytes"),
    "string array size": (gguf_bytes(typed("IIQ", 9, 8, 2**61)), "strings do not fit"),
    "string in array": (gguf_bytes(typed("IIQQ", 9, 8, 1, 2**64 - 4)), "past the end"),
    "nesting": (gguf_bytes(typed("I" + "IQ" * 64, 9, *(9, 1) * 64)), "nests too many"),
    "number of nested arrays": (gguf_bytes(typed("IIQ", 9, 9, 2**32)), "nests too many"),
    "empty key": (gguf_bytes({"": 1}), "0 characters"),
    "long key": (gguf_bytes({"k" * 2**16: 1}), "65536 characters"),
    "alignment 0": (gguf_bytes({"general.alignment": 0}), "power of two"),
    "alignment 24": (gguf_bytes({"general.alignment": 24}), "power of two"),
    "alignment text": (gguf_bytes({"general.alignment": "32"}), "power of two"),
    "long name": (gguf_bytes({}, [Tensor("n" * 1025, (1,), F32, bytes(4))]), "1025 characters"),
    "rank": (one(1, 1, 1, 1, 1), "5 dimensions"),
    "dimension 0": (one(4, 0), "impossible dimensions"),
    "product overflows": (one(2**33, 2**33), "impossible dimensions"),
    "size past the end": (one(2**40), "but the file ends at"),
    "offset past the end": (one(4, offset=2**64 - 32), "but the file ends at"),
    "unaligned": (one(4, offset=4), "not a multiple of 32"),
    "row size": (one(33, kind=Q4_1, size=64), "not a multiple of Q4_1's block"),
    "overlap": (
        gguf_bytes({}, [Tensor("a", (16,), F32, bytes(64)), Tensor("b", (8,), F32, bytes(32), 32)]),
        "'a' and 'b' overlap",
    ),
    "same name": (
        gguf_bytes({}, [Tensor("a", (8,), F32, bytes(32)), Tensor("a", (8,), F16, bytes(32))]),
        "given twice",
    ),
}


@pytest.mark.parametrize(("data", "reason"), BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_a_header_that_lies_is_refused_with_the_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    assert reason in refusal(tmp_path, data)


@pytest.mark.parametrize(
    "value", [struct.pack("<IQ", 8, 1 << 30), struct.pack("<IIQ", 9, 4, 1 << 28)], ids=["string", "array"]
)
def test_a_value_that_would_fill_the_memory_is_refused(tmp_path: Path, value: bytes) -> None:
    path = write(tmp_path / "large.gguf", gguf_bytes({"large": value}))
    with path.open("r+b") as file:
        file.truncate(4 << 30)  # a hole
    with pytest.raises(ModelLoadError, match=r"metadata `large` has 1073741824 bytes; at most 268435456"):
        GgufFile.open(path)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    data = gguf_bytes({"a": 1, "b": 2}).replace(string("b"), string("a"))
    assert "`a` is given twice" in refusal(tmp_path, data)


def test_a_string_of_an_array_that_is_not_text_is_refused_when_read(tmp_path: Path) -> None:
    array = struct.pack("<IIQ", 9, 8, 2) + string("fine") + string(b"\xff")
    strings = open_bytes(tmp_path, gguf_bytes({"names": array})).metadata["names"]
    assert len(strings) == 2
    with pytest.raises(ModelLoadError, match=r"`names`\[1\] is not UTF-8"):
        list(strings)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in [
        (tmp_path / "absent.gguf", "no such file"),
        (tmp_path / "pipe", "not a regular file"),
        (write(tmp_path / "empty", b""), "is empty"),
        (tmp_path, "tmp|regular"),
    ]:
        with pytest.raises(ModelLoadError, match=reason):
            GgufFile.open(path)
