"""ggml's tensor types: those of the table of weight formats, those converted on load, and the others."""

from __future__ import annotations

from tgi_asgi import _C
from tgi_asgi.formats.gguf_converted import CONVERTED, ConvertedType

READ: dict[int, _C.WeightFormat | ConvertedType] = {
    **CONVERTED,
    **{row.ggml_type: row for row in _C.formats() if row.ggml_type is not None},
}
# Names for the message that refuses them (ggml.h). Files of 2024 have Q4_0 in orders for ARM, which llama.cpp
# has since dropped.
_OTHERS = {
    15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
}  # fmt: skip


def name_of(number: int) -> str:
    """Return a type's name for messages, or its number if it has none."""
    row = READ.get(number)
    return row.name if row is not None else _OTHERS.get(number, f"number {number}")
