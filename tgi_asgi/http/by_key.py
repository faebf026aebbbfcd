"""Routes that take several kinds of request tell them apart by a key of the body."""

from __future__ import annotations

import enum

from msgspec import UNSET

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.http.errors import Dialect
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.parse import decode_json
from tgi_asgi.http.tgi_schema import REQUEST_KEYS


class Kind(enum.Enum):
    """A request by its main field; the first of them that a body has decides."""

    INPUTS = "inputs"
    MESSAGES = "messages"
    PROMPT = "prompt"


def kind_of(body: bytes) -> Kind:
    """Return what kind of request a body is; null counts as absent.

    Raises:
        InvalidRequest: it is no JSON object, or has none of the keys.
    """
    keys = decode_json(body, REQUEST_KEYS)
    for kind in Kind:
        value = getattr(keys, kind.value)
        if value is not UNSET and bytes(value) != b"null":
            return kind
    raise InvalidRequest("One of `inputs`, `messages` and `prompt` is required", param="inputs")


async def dispatch(exchange: Exchange) -> Kind:
    """Look at the body, put it back, and speak the dialect of its kind from here on."""
    body = await exchange.read_body(is_of_any_type=True)
    kind = kind_of(body)
    if kind is not Kind.INPUTS and not exchange.context.settings.tgi_compat:
        exchange.dialect = Dialect.OPENAI
    exchange.require_json()
    exchange.put_back(body)
    return kind
