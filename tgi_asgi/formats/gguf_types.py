"""ggml's tensor types: the supported ones, from the table of weight formats, and the others by name."""

from __future__ import annotations

from tgi_asgi import _C

READ: dict[int, _C.WeightFormat] = {row.ggml_type: row for row in _C.formats() if row.ggml_type is not None}
# Names for the message that refuses them (ggml.h).
_OTHERS = {
    15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
    41: "Q1_0",
}  # fmt: skip


def name_of(number: int) -> str:
    """Return a type's name for messages, or its number if it has none."""
    row = READ.get(number)
    return row.name if row is not None else _OTHERS.get(number, f"number {number}")
