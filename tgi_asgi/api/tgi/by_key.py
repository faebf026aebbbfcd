"""Routes that take several kinds of request tell them apart by a key of the body."""

from __future__ import annotations

import enum

import msgspec
from msgspec import UNSET, Struct, UnsetType

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
    inputs: msgspec.Raw | UnsetType = UNSET
    messages: msgspec.Raw | UnsetType = UNSET
    prompt: msgspec.Raw | UnsetType = UNSET


_DECODER = msgspec.json.Decoder(_Keys)


def kind_of(body: bytes) -> Kind:
    """Return what kind of request a body is; null counts as absent.

    Raises:
        InvalidRequest: it is no JSON object, or has none of the keys.
    """
    keys = decode_json(body, _DECODER)
    for kind in Kind:
        value = getattr(keys, kind.value)
        if value is not UNSET and bytes(value) != b"null":
            return kind
    raise InvalidRequest("One of `inputs`, `messages` and `prompt` is required", param="inputs")


async def read_kind(exchange: Exchange) -> tuple[Kind, bytes]:
    """Read the body, and speak the dialect of its kind from here on."""
    body = await exchange.read_body(is_of_any_type=True)
    kind = await exchange.work(kind_of, body)
    if kind is not Kind.INPUTS and not exchange.context.settings.tgi_compat:
        exchange.dialect = OPENAI
    exchange.require_json()
    return kind, body
