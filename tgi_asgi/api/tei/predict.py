"""TEI's `POST /predict`: a classifier's labels for texts or pairs of texts, with their scores."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.parse import decode_json, refuse_field
from tgi_asgi.api.pool_call import Input, Pair, PoolCall, Pooled, check_num_inputs, classification_of
from tgi_asgi.api.tei.request import Side, truncation_of
from tgi_asgi.api.vectors import activate, best_first


class PredictRequest(Struct, kw_only=True):
    """The body of `POST /predict`.

    Attributes:
        inputs: A text, a pair of texts, or a list of lists, each of one text or a pair.
    """

    inputs: str | list[str | list[str]]
    raw_scores: bool | None = None
    truncate: bool | None = None
    truncation_direction: Side | None = None


class Prediction(Struct):
    """A label and its score; an input's predictions come best first."""

    score: float
    label: str


_DECODER = msgspec.json.Decoder(PredictRequest)


def parse_predict(body: bytes, exchange: Exchange) -> PoolCall:
    """Parse a request to classify; the answer is an array of predictions, or an array of those."""
    request = decode_json(body, _DECODER)
    how = classification_of(exchange.context.ready().info)
    inputs, is_batch = _inputs(request.inputs)
    check_num_inputs(len(inputs), "inputs", exchange.context.settings)

    def answer(pooled: Pooled) -> bytes:
        predictions = []
        for logits in pooled.vectors:
            scores = logits.tolist() if request.raw_scores else activate(logits, how.activation)
            predictions.append([Prediction(scores[at], how.labels[at]) for at in best_first(scores)])
        return msgspec.json.encode(predictions if is_batch else predictions[0])

    return PoolCall(
        inputs=inputs,
        how=how,
        answer=answer,
        truncation=truncation_of(request.truncate, request.truncation_direction),
    )


def _inputs(given: str | list[str | list[str]]) -> tuple[list[Input], bool]:
    """Return the inputs, and whether the answer is an array of each one's predictions."""
    if isinstance(given, str):
        return [_input([given], "inputs")], False
    if all(isinstance(each, str) for each in given):
        return [_input(given, "inputs")], False
    return [_input(each, f"inputs[{at}]") for at, each in enumerate(given)], True


def _input(texts: object, where: str) -> Input:
    match texts:
        case [str(text)] if text:
            return Input(text, where)
        case [str(first), str(second)] if first and second:
            return Input(Pair(first, second), where)
    refuse_field(where, "must be a text or a pair of texts, none of them empty; a batch is a list of lists")
