"""Routes that take several kinds of request tell them apart by a key of the body."""

from __future__ import annotations

import enum

import msgspec
from msgspec import Struct

from tgi_asgi.api.errors import OPENAI
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.parse import decode_json
from tgi_asgi.errors import InvalidRequest


class Kind(enum.Enum):
    """A request by its main field; the first of them that a body has decides."""

    INPUTS = "inputs"
    MESSAGES = "messages"
    PROMPT = "prompt"


class _Keys(Struct, frozen=True):
    inputs: msgspec.Raw = msgspec.Raw(b"null")
    messages: msgspec.Raw = msgspec.Raw(b"null")
    prompt: msgspec.Raw = msgspec.Raw(b"null")


_DECODER = msgspec.json.Decoder(_Keys)


def kind_of(body: bytes) -> Kind:
    """Return what kind of request a body is; null counts as absent.

    Raises:
        InvalidRequest: it is no JSON object, or has none of the keys.
    """
    keys = decode_json(body, _DECODER)
    for kind in Kind:
        if bytes(getattr(keys, kind.value)) != b"null":
            return kind
    raise InvalidRequest("One of `inputs`, `messages` and `prompt` is required", param="inputs")


def speak(body: bytes, exchange: Exchange) -> Kind:
    """Return what kind of request a body is, and speak its dialect from here on.

    Raises:
        InvalidRequest: as `kind_of`.
        UnsupportedMediaType: it is TGI's, and not declared to be JSON.
    """
    kind = kind_of(body)
    if kind is not Kind.INPUTS and not exchange.context.settings.tgi_compat:
        exchange.dialect = OPENAI
    exchange.require_json()
    return kind
