"""References of a JSON schema to a part of its own document: `#/$defs/name` (RFC 6901, in a URL)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

Schema = Mapping[str, Any]
Resolve = Callable[[str], Schema | None]


def resolver(document: Schema) -> Resolve:
    """Return a function that finds the schema of a reference like `#/$defs/name`, or None."""

    def resolve(reference: str) -> Schema | None:
        if reference != "#" and not reference.startswith("#/"):
            return None
        found: Any = document
        for part in reference.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, Mapping) and name in found:
                found = found[name]
            else:
                return None
        return found if isinstance(found, Mapping) else None

    return resolve
