"""`POST /classify`, as in vLLM and SGLang: the label of each text, with the probabilities of all labels."""

from __future__ import annotations

import time
from secrets import token_hex

import msgspec
import orjson

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.openai.pool_request import PoolRequest, inputs_of, usage
from tgi_asgi.api.parse import check_ranges, decode_json
from tgi_asgi.api.pool_call import PoolCall, Pooled, classification_of
from tgi_asgi.api.vectors import activate
from tgi_asgi.model_info import Activation


class ClassifyRequest(PoolRequest, kw_only=True):
    """Body of `POST /classify` and `/v1/classify`."""

    input: str | list[str | int | list[int]]
    use_activation: bool | None = None  # false: `probs` are the logits
    add_special_tokens: bool | None = None
    user: str | None = None


_DECODER = msgspec.json.Decoder(ClassifyRequest)


def parse_classify(body: bytes, exchange: Exchange) -> PoolCall:
    """Parse a request to classify texts."""
    request = decode_json(body, _DECODER)
    check_ranges(request)
    info, settings = exchange.context.ready().info, exchange.context.settings
    how = classification_of(info)
    activation = Activation.IDENTITY if request.use_activation is False else how.activation

    def answer(pooled: Pooled) -> bytes:
        data = [
            {
                "index": index,
                "label": how.labels[int(logits.argmax())],
                "probs": activate(logits, activation),
                "num_classes": len(how.labels),
            }
            for index, logits in enumerate(pooled.vectors)
        ]
        shown = {
            "id": f"classify-{token_hex(16)}",
            "object": "list",
            "created": int(time.time()),
            "model": pooled.model,
            "data": data,
            "usage": usage(pooled.num_tokens),
        }
        return orjson.dumps(shown)

    inputs = inputs_of(request.input, "input", info, settings)
    return request.call(inputs, how, answer, adds_special_tokens=request.add_special_tokens is not False)
