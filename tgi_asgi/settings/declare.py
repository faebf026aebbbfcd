"""How a setting is declared, named as a flag, and parsed from a variable."""

from __future__ import annotations

import dataclasses
from typing import Any

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import kinds
from tgi_asgi.settings.json_object import MAX_SHOWN

_SWITCH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)


def flag_of(name: str) -> str:
    """Return a setting's flag: `--max-batch-size` for `max_batch_size`."""
    return f"--{name.replace('_', '-')}"


def declared(
    group: str,
    help: str,
    default: Any = None,
    kind: kinds.Kind = kinds.PLAIN,
    *,
    flag: str = "",
    alias: str = "",
) -> Any:
    """Declare a field with its help text, default and kind.

    Args:
        group: Heading that `--help` lists it under.
        flag: A second flag.
        alias: A second name, for both the flag and the variable.
    """
    metadata = {"group": group, "help": help, "kind": kind, "choices": kind.choices}
    metadata["flags"] = tuple(filter(None, (flag, alias and flag_of(alias))))
    metadata["env"] = (alias.upper(),) if alias else ()
    return dataclasses.field(default=default, metadata=metadata)


def parsed(spec: dataclasses.Field[Any], variable: str, text: str) -> Any:
    """Parse an environment value by the field's annotation; click parses the flags.

    Raises:
        InvalidRequest: if it has another form; the message names the variable.
    """
    kind = str(spec.type).partition(" ")[0]
    try:
        match kind:
            case "bool":
                return _SWITCH[text.strip().lower()]
            case "int":
                return int(text)
            case "float":
                return float(text)
    except (KeyError, ValueError):
        shown = repr(text)[:MAX_SHOWN]
        raise InvalidRequest(f"{variable}={shown} is not a valid {kind}") from None
    return (text,) if kind.startswith("tuple") else text
