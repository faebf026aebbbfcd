"""Integer codes of quantised safetensors, against numpy, for shapes that fill no tile and no line."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from tgi_asgi import _C
from tgi_asgi.ops import FORMATS, WeightSource
from tgi_asgi.ops.sources import as_bfloat16, decode, rounded

AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)  # the row in each nibble of a word, the lowest first


def random_words(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.int32]:
    return rng.integers(-(2**31), 2**31, shape).astype(np.int32)


def as_nibbles(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return codes [rows, columns] two to a byte, the first in the low half."""
    return codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 15), (3, 200), (130, 33)])
def test_words_are_transposed(shape: tuple[int, int]) -> None:
    words = random_words(np.random.default_rng(0), *shape)
    np.testing.assert_array_equal(_C.transposed_words(words), words.T)


def test_words_of_a_file_may_be_unaligned() -> None:
    words = random_words(np.random.default_rng(1), 9, 6)
    unaligned = np.frombuffer(b"x" + words.tobytes(), np.uint8)[1:].view(np.int32).reshape(9, 6)
    np.testing.assert_array_equal(_C.transposed_words(unaligned), words.T)
    np.testing.assert_array_equal(_C.awq_codes(unaligned[:8]), _C.awq_codes(words[:8]))


@pytest.mark.parametrize(("columns", "width"), [(2, 1), (128, 16), (130, 17), (262, 40)])
def test_awq_s_words_become_rows_of_nibbles(columns: int, width: int) -> None:
    words = random_words(np.random.default_rng(2), columns, width)
    codes = np.empty((width, 8, columns), np.uint8)
    for place, row in enumerate(AWQ_ROWS):
        codes[:, row] = (words.view(np.uint32) >> 4 * place & 15).T
    np.testing.assert_array_equal(_C.awq_codes(words), as_nibbles(codes.reshape(8 * width, columns)))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("num_words", [1, 7])
def test_streams_of_codes_are_unpacked(bits: int, num_words: int) -> None:
    words = random_words(np.random.default_rng(8), 5, num_words)
    streams = [int.from_bytes(row.tobytes(), "little") for row in words]
    count = num_words * 32 // bits
    expected = [[stream >> bits * i & (1 << bits) - 1 for i in range(count)] for stream in streams]
    np.testing.assert_array_equal(_C.unpacked_stream(words, bits), expected)


def test_nibbles_are_put_into_another_order() -> None:
    rng = np.random.default_rng(3)
    codes, order = rng.integers(0, 16, (7, 70), dtype=np.uint8), rng.permutation(70)
    np.testing.assert_array_equal(_C.reordered_nibbles(as_nibbles(codes), order), as_nibbles(codes[:, order]))
    with pytest.raises(ValueError, match=r"`order`\[0\] must be in \[0, 70\), got 70"):
        _C.reordered_nibbles(as_nibbles(codes), np.full(70, 70))


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_in_groups_of_any_order_are_decoded(bits: int) -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 1 << bits, (5, 66), dtype=np.uint8)
    scales = rng.standard_normal((5, 3)).astype(np.float32)
    scales[0, 0] = 1e-40  # the threads of the team would flush it
    zeros, groups = rng.integers(0, 256, (5, 3), dtype=np.uint8), rng.integers(0, 3, 66)
    found = _C.dequantise(as_nibbles(codes) if bits == 4 else codes, bits, scales, zeros, groups)
    expected = (codes.astype(np.float32) - zeros[:, groups]) * scales[:, groups]
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"`groups`\[2\] must be in \[0, 3\), got -1"):
        _C.dequantise(codes, 8, scales, zeros, np.array([0, 0, -1] + [0] * 63))


@pytest.mark.parametrize("is_high_first", [False, True])
@pytest.mark.parametrize(("count", "run"), [(1, 5), (99, 7), (40_001, 64), (40_000, 1 << 40)])
def test_nibbles_of_a_table_are_decoded(count: int, run: int, is_high_first: bool) -> None:
    rng = np.random.default_rng(5)
    packed = rng.integers(0, 256, -(-count // 2), dtype=np.uint8)
    table = rng.standard_normal(16).astype(np.float32)
    scales = rng.standard_normal((count - 1) // run + 1).astype(np.float32)
    halves = [packed >> 4, packed & 15] if is_high_first else [packed & 15, packed >> 4]
    codes = np.stack(halves, 1).reshape(-1)[:count]
    expected = table[codes] * scales[np.arange(count) // run]
    found = _C.decode_nibbles(packed, count, is_high_first, table, scales, run)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="`scales` must have one number for each run"):
        _C.decode_nibbles(packed, count, is_high_first, table, scales[:-1], run)


@pytest.mark.parametrize("name", ["F32", "F16", "F8_64", "Q4_K"])
def test_rows_are_rounded_to_bfloat16(name: str) -> None:
    rng, info = np.random.default_rng(6), FORMATS[name]
    columns = 2304  # pieces of 1,024 and a rest
    data = rng.integers(0, 256, 33 * columns // info.block_columns * info.block_bytes, dtype=np.uint8)
    source = WeightSource(data, name, (33, columns))
    np.testing.assert_array_equal(rounded(source).data, as_bfloat16(decode(source)).data)


def halves_of(values: npt.NDArray[np.float32], order: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16] | None:
    return _C.decode_halves(values.reshape(-1).view(np.uint8), "F32", values.shape[1], order)


def test_rows_are_rounded_to_float16_in_another_order() -> None:
    """All exponents of float16 and some below, and every tie: the mantissa's last 13 bits are 0x1000."""
    rng = np.random.default_rng(7)
    bits = rng.integers(0x33000000, 0x477FE000, (40, 1100), dtype=np.uint32)
    bits[::2] = bits[::2] & 0xFFFFE000 | 0x1000
    bits[::3] |= 0x80000000
    bits[0, :5] = 0, 0x80000000, 1, 0x33000000, 0x33000001  # zeros, and about half of the least number
    values, order = bits.view(np.float32), rng.permutation(1100)
    expected = np.empty(values.shape, np.float16)
    expected[:, order] = values.astype(np.float16)
    found = halves_of(values, order)
    assert found is not None
    np.testing.assert_array_equal(found, expected.view(np.uint16))


@pytest.mark.parametrize("value", [65520.0, -np.inf, np.nan])
def test_numbers_that_float16_does_not_hold_are_noticed(value: float) -> None:
    values = np.full((3, 32), 65519.0, np.float32)
    assert halves_of(values, np.arange(32)) is not None
    values[2, 31] = value
    assert halves_of(values, np.arange(32)) is None
