"""Whether a model fits the memory of a CPU, known before any of it is read."""

from __future__ import annotations

from collections.abc import Iterable

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError

_GIB = 1 << 30


def packed_bytes(tensors: Iterable[tuple[str, int]], packing: ops.Packing) -> int:
    """Return about what weights take once they are packed.

    tensors: the format of each, and its elements.
    """
    return int(sum(elements * _bytes_each(name, packing) for name, elements in tensors))


def _bytes_each(name: str, packing: ops.Packing) -> float:
    info = ops.FORMATS.get(name)
    if info is None:  # a part of a quantised matrix: words of codes, zero points
        return 4.0
    if info.has_kernel and (info.is_quantised or packing.quantise is None):
        return info.block_bytes / info.block_columns
    if packing.quantise is None:  # FP8
        return 4.0 if packing.is_exact else 2.0
    quantised = ops.FORMATS[packing.quantise]
    return quantised.block_bytes / quantised.block_columns


def check_weights_fit(tensors: list[tuple[str, int]], packing: ops.Packing, free_bytes: int) -> int:
    """Return what the weights will take.

    Raises:
        ModelLoadError: it is more than is free; the message says what would fit.
    """
    needed = packed_bytes(tensors, packing)
    if needed <= free_bytes:
        return needed
    smaller = [
        f"--quantize {name.lower()} ({size / _GIB:.1f} GiB)"
        for name in ("Q8_0", "Q4_0")
        if (size := packed_bytes(tensors, ops.Packing(packing.is_exact, name))) <= free_bytes
    ]
    advice = (
        f"{' or '.join(smaller)} would fit"
        if smaller
        else "take a smaller model, or a smaller quantisation of it"
    )
    raise ModelLoadError(
        f"the model's weights take {needed / _GIB:.1f} GiB, but {free_bytes / _GIB:.1f} GiB of memory are "
        f"free: {advice}"
    )


def check_rope_fits(head_dim: int, max_positions: int, free_bytes: int) -> None:
    """Refuse a context whose rotary table alone does not fit.

    Raises:
        ModelLoadError: it is so; the message says which context would do.
    """
    each = ops.RopeTable.bytes_per_position(head_dim)
    if max_positions * each > free_bytes // 2:
        raise ModelLoadError(
            f"a context of {max_positions} tokens needs {max_positions * each / _GIB:.1f} GiB for its rotary "
            f"table, {free_bytes / _GIB:.1f} GiB are free: set --max-total-tokens to at most "
            f"{max(free_bytes // 2 // each, 1)}"
        )
