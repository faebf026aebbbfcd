"""TEI's form of `/tokenize`: an array of tokens for each text."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from msgspec import Struct

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.parse import decode_json
from tgi_asgi.api.pool_call import check_num_inputs
from tgi_asgi.api.prompt import check_countable
from tgi_asgi.api.served import Served
from tgi_asgi.api.tei.request import TEI, prompt_of
from tgi_asgi.api.tokenising import Tokenise, WithImages, array_of


class TeiTokenizeRequest(Struct, frozen=True):
    """The body of TEI's `POST /tokenize`."""

    inputs: str | list[str]
    add_special_tokens: bool | None = None
    prompt_name: str | None = None


class TeiToken(Struct, frozen=True, gc=False):
    """A token; `start` and `stop` count the text's UTF-8 bytes, and an added special token has none."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class _Keys(Struct):
    inputs: msgspec.Raw = msgspec.Raw(b"null")


_KEYS = msgspec.json.Decoder(_Keys)
_REQUEST = msgspec.json.Decoder(TeiTokenizeRequest)


def tei_tokenize_or(tokenise: Tokenise) -> Tokenise:
    """Return a function that answers in TEI's form if `inputs` is a list or the model does not generate.

    Everything else is for `tokenise`.
    """

    def either(body: bytes, exchange: Exchange) -> bytes | WithImages:
        generates = exchange.context.ready().info.generates
        if not generates:
            exchange.dialect = TEI
        inputs = bytes(decode_json(body, _KEYS).inputs)
        if inputs == b"null" or (generates and not inputs.startswith(b"[")):
            return tokenise(body, exchange)
        exchange.dialect = TEI
        exchange.require_json()
        return _tokenize(body, exchange)

    return either


def _tokenize(body: bytes, exchange: Exchange) -> bytes:
    served = exchange.context.ready()
    request = decode_json(body, _REQUEST)
    texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    check_num_inputs(len(texts), "inputs", exchange.context.settings)
    embedding = served.info.embedding
    if request.prompt_name is not None and embedding is not None:
        prompt = prompt_of(request.prompt_name, "prompt_name", embedding)
        texts = [prompt + text for text in texts]
    check_countable("".join(texts), served)
    adds = request.add_special_tokens is not False
    return b"[" + b",".join(array_of(_tokens(text, served, adds)) for text in texts) + b"]"


def _tokens(text: str, served: Served, adds_special_tokens: bool) -> Iterator[TeiToken]:
    tokenizer, data = served.tokenizer, text.encode()
    for token_id, start, stop in tokenizer.encode_with_offsets(text, add_special_tokens=adds_special_tokens):
        if start == stop and token_id in tokenizer.special_ids:
            yield TeiToken(token_id, tokenizer.piece(token_id) or "", True, None, None)
        else:
            yield TeiToken(token_id, data[start:stop].decode("utf-8", "replace"), False, start, stop)
