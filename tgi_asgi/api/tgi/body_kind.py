"""Dispatch for routes that accept several kinds of request, distinguished by a key of the body."""

from __future__ import annotations

import msgspec

from tgi_asgi.api.errors import CHAT, OPENAI
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.parse import decode_json, refuse

KINDS = ("inputs", "messages", "prompt")  # main fields: the first one present in a body decides

_ABSENT = msgspec.Raw(b"")
_Keys = msgspec.defstruct("_Keys", [(kind, msgspec.Raw, _ABSENT) for kind in KINDS])
_DECODER = msgspec.json.Decoder(_Keys)


def main_field(body: bytes) -> str:
    """Return which of `KINDS` a body is; null counts as absent if there is another.

    Raises:
        InvalidRequest: if it is not a JSON object or has none of the keys.
    """
    keys = decode_json(body, _DECODER)
    given = {kind: value for kind in KINDS if (value := bytes(getattr(keys, kind)))}
    for kind in [kind for kind, value in given.items() if value != b"null"] or given:
        return kind  # of a body with nulls only, the kind whose field is refused
    refuse("inputs", "One of `inputs`, `messages` and `prompt` is required")


def set_dialect(body: bytes, exchange: Exchange) -> str:
    """Return which of `KINDS` a body is, and set the exchange's dialect accordingly.

    Raises:
        InvalidRequest: as in `main_field`.
        UnsupportedMediaType: if it is TGI's and not declared as JSON.
    """
    kind = main_field(body)
    if kind != "inputs" and not exchange.context.settings.tgi_compat:
        exchange.dialect = CHAT if kind == "messages" else OPENAI
    exchange.require_json()
    return kind
