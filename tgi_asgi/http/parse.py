"""Decode a JSON body into a msgspec struct, and say which field was wrong by its dotted path."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from tgi_asgi.errors import InvalidRequest

T = TypeVar("T")

_AT = re.compile(r"^(.*) - at `(?:key in )?\$\.?(.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(.*)`$")


def decode_json(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode `body` strictly: types are not coerced, unknown fields are ignored.

    Raises:
        InvalidRequest: with `is_syntax` when the body is not JSON; else `param` names the field at fault.
    """
    try:
        # msgspec skips unknown fields without looking at their bytes.
        body.decode("utf-8")
        return decoder.decode(body)
    except UnicodeDecodeError:
        raise InvalidRequest("The request body is not valid UTF-8", is_syntax=True) from None
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply", is_syntax=True) from None
    except msgspec.ValidationError as error:
        raise invalid_field(str(error)) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}", is_syntax=True) from None


def invalid_field(message: str) -> InvalidRequest:
    """Turn msgspec's words (`Expected ... - at `$.a[0].b``) into ours, with the field's path in `param`."""
    path = ""
    if match := _AT.match(message):
        message, path = match.groups()
    if match := _MISSING.match(message):
        path = f"{path}.{match[1]}" if path else match[1]
        return InvalidRequest(f"`{path}` is required", param=path)
    message = message[:1].lower() + message[1:]
    if path:
        return InvalidRequest(f"`{path}`: {message}", param=path)
    return InvalidRequest(f"The request body: {message}")
