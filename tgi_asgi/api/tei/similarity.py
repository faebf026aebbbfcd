"""TEI's `POST /similarity`: the cosine between the embedding of a text and those of others."""

from __future__ import annotations

import msgspec
import orjson
from msgspec import Struct

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.parse import decode_json, refuse_field
from tgi_asgi.api.pool_call import Input, PoolCall, Pooled, check_num_inputs, embedding_of
from tgi_asgi.api.tei.request import Side, prompt_of, truncation_of
from tgi_asgi.api.vectors import cosine


class Sentences(Struct):
    """A text, and the texts that it is compared with."""

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(Struct):
    """Optional fields of a comparison."""

    truncate: bool | None = None
    truncation_direction: Side | None = None
    prompt_name: str | None = None


class SimilarityRequest(Struct):
    """The body of `POST /similarity`."""

    inputs: Sentences
    parameters: SimilarityParameters | None = None


_DECODER = msgspec.json.Decoder(SimilarityRequest)


def parse_similarity(body: bytes, exchange: Exchange) -> PoolCall:
    """Parse a request to compare texts; the answer is an array of cosines."""
    request = decode_json(body, _DECODER)
    source, others = request.inputs.source_sentence, request.inputs.sentences
    parameters = request.parameters or SimilarityParameters()
    embedding = embedding_of(exchange.context.ready().info)
    check_num_inputs(len(others), "inputs.sentences", exchange.context.settings)
    prompt = prompt_of(parameters.prompt_name, "parameters.prompt_name", embedding)
    given = [(source, "inputs.source_sentence")]
    given += ((text, f"inputs.sentences[{at}]") for at, text in enumerate(others))
    for text, where in given:
        if not text:
            refuse_field(where, "must not be empty")

    def answer(pooled: Pooled) -> bytes:
        first, *rest = pooled.vectors
        return orjson.dumps([cosine(first, each) for each in rest])

    return PoolCall(
        inputs=[Input(prompt + text, where) for text, where in given],
        how=embedding,
        answer=answer,
        truncation=truncation_of(parameters.truncate, parameters.truncation_direction),
    )
