"""The parameter structs of csrc as ctypes, parsed from the headers."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import Any

_CSRC = Path(__file__).parents[2] / "csrc"
_PLAIN: dict[str, type] = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
    "Type": ctypes.c_int32,
    "MlpActivation": ctypes.c_int32,
    "RouteKind": ctypes.c_int32,
}
_FIELD = re.compile(r"^  (?:const )?([\w:]+)(\*?)\s+(\w+)(?:\[(\d+)\])?;", re.MULTILINE)


@functools.cache
def params_struct(name: str, header: str = "cuda/kernels.h") -> type[ctypes.Structure]:
    """Return the struct of this name in the header."""
    text = (_CSRC / header).read_text()
    found = re.search(rf"^struct {name} {{\n(.*?)^}};", text, re.MULTILINE | re.DOTALL)
    assert found, f"{header} has no struct {name}"
    fields = [
        (field, _field_type(kind, star, int(count or 0)))
        for kind, star, field, count in _FIELD.findall(found[1])
    ]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _field_type(kind: str, star: str, count: int) -> type:
    if count:
        of_one: Any = _field_type(kind, star, 0)
        array: type = of_one * count
        return array
    if star:
        return ctypes.c_void_p
    if kind.startswith("::tgi::"):
        return params_struct(kind.removeprefix("::tgi::"), "params.h")
    return _PLAIN[kind] if kind in _PLAIN else params_struct(kind)
