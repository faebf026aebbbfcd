"""TGI's wire types: requests and answers of the native routes as msgspec structs.

Decoding checks only types. Ranges, and the order in which TGI reports them, belong to `request.py`. The
bounds are in `extra_json_schema`, so that the OpenAPI document has them without msgspec enforcing them in its
own order. Null in an optional field means the default; unknown fields are ignored. Field order is the order
of the keys on the wire.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

MAX_SEED = 2**64 - 1

FinishReasonName = Literal["length", "eos_token", "stop_sequence"]


def _field(description: str | None = None, **schema: Any) -> Meta:
    """Describe a field, only for the OpenAPI document."""
    return Meta(description=description, extra_json_schema=schema or None)


_Flag = bool | None
_Count = Annotated[int, Meta(ge=0)] | None  # in TGI, a negative number is a wrong type, not a wrong value
_Some = Annotated[_Count, _field(minimum=1)]
_Positive = Annotated[float | None, _field(exclusiveMinimum=0)]
_Mass = Annotated[_Positive, _field(exclusiveMaximum=1)]
_Penalty = Annotated[float | None, _field(minimum=-2.0, maximum=2.0)]


class Grammar(Struct, frozen=True):
    """A constraint on the output; `type` determines how `value` is interpreted."""

    type: Literal["json", "json_object", "json_schema", "regex"]
    value: Annotated[Any, _field('JSON Schema, a string that contains one, {"schema": ...}, or a regex.')]


class GenerateParameters(Struct, frozen=True, kw_only=True):
    """Generation parameters. Every field may be absent or null."""

    adapter_id: Annotated[str | None, _field("Name of the adapter to use.")] = None
    best_of: Annotated[_Count, _field("Sequences to generate; the likeliest is returned (default 1).")] = None
    temperature: Annotated[_Positive, _field("Divides the logits; not 1 means sampling (default 1).")] = None
    repetition_penalty: Annotated[_Positive, _field("Factor, over prompt and output (default 1).")] = None
    frequency_penalty: Annotated[_Penalty, _field("Subtracted per occurrence in the output (default 0).")] = (
        None
    )
    top_k: Annotated[int | None, _field("Sample from the k likeliest tokens.", exclusiveMinimum=0)] = None
    top_p: Annotated[_Mass, _field("Sample from the likeliest tokens of this mass.")] = None
    typical_p: Annotated[_Mass, _field("Sample from the most typical tokens of this mass.")] = None
    do_sample: Annotated[_Flag, _field("Sample (default false; without `parameters` at all, true).")] = None
    max_new_tokens: Annotated[_Some, _field("Maximum new tokens (default: fill the context).")] = None
    return_full_text: Annotated[_Flag, _field("Begin with `inputs` (default: true only on `POST /`).")] = None
    stop: Annotated[list[str] | None, _field("Strings that end the text, kept in it.", maxItems=4)] = None
    truncate: Annotated[_Some, _field("Keep this many tokens of the prompt's end.")] = None
    watermark: Annotated[_Flag, _field("Accepted and ignored.")] = None
    details: Annotated[_Flag, _field("Return `details` (default false).")] = None
    decoder_input_details: Annotated[_Flag, _field("`details` with the prompt's tokens, if allowed.")] = None
    seed: Annotated[_Count, _field("Same seed, same text (default: random).", maximum=MAX_SEED)] = None
    top_n_tokens: Annotated[_Count, _field("Likeliest tokens shown per step (default 0).", maximum=5)] = None
    grammar: Annotated[Grammar | None, _field("Constraint on the output.")] = None


class GenerateRequest(Struct, frozen=True):
    """Body of `/generate` and `/generate_stream`."""

    inputs: Annotated[str, _field("The prompt.", minLength=1)]
    parameters: GenerateParameters | None = None


class CompatGenerateRequest(GenerateRequest, frozen=True):
    """Body of `POST /`: a GenerateRequest with a field that asks for streaming."""

    stream: bool | None = None


class VertexRequest(Struct, frozen=True):
    """Body of `/vertex`; each instance is a GenerateRequest or a chat request."""

    instances: Annotated[list[msgspec.Raw], _field("`stream` of an instance is ignored.", minItems=1)]


class PrefillToken(Struct, frozen=True, gc=False):
    """One token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class Token(PrefillToken, frozen=True, gc=False):
    """One generated token."""

    special: bool


class BestOfSequence(Struct, frozen=True, kw_only=True):
    """A sequence of `best_of` other than the best."""

    generated_text: str
    finish_reason: FinishReasonName
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class Details(Struct, frozen=True, kw_only=True):
    """Details of an answer, token by token."""

    finish_reason: FinishReasonName
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET


class GenerateResponse(Struct, frozen=True):
    """Answer of `/generate`; `POST /` answers with an array of one."""

    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(Struct, frozen=True):
    """`details` of a stream's last event."""

    finish_reason: FinishReasonName
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(Struct, frozen=True, kw_only=True):
    """One event of a native stream; `index` counts from 1."""

    index: int
    token: Token
    top_tokens: list[Token] | UnsetType = UNSET
    generated_text: str | None
    details: StreamDetails | None


class SimpleToken(Struct, frozen=True, gc=False):
    """A token of a text; `start` and `stop` count its UTF-8 bytes."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(Struct, frozen=True):
    """A templated conversation and its tokens."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class TokenizeRequest(Struct, frozen=True):
    """Body of `/tokenize` in TGI's form; special tokens are added."""

    inputs: Annotated[str, _field("Text to tokenise.")]


class PromptTokenizeRequest(Struct, frozen=True):
    """Body of `/tokenize` in vLLM's form; with `messages` it is a chat request instead."""

    prompt: Annotated[str, _field("Text to tokenise.")]
    model: Annotated[str | None, _field("Name of the model; checked with `--strict-model-names`.")] = None
    add_special_tokens: Annotated[_Flag, _field("Whether to add BOS etc. (default true).")] = None
    return_token_strs: Annotated[_Flag, _field("Whether to return the tokens' strings.")] = None


class DetokenizeRequest(Struct, frozen=True):
    """Body of `/detokenize`."""

    tokens: Annotated[list[int], _field("Token ids, each below the vocabulary's size.")]
    model: Annotated[str | None, _field("Name of the model; checked with `--strict-model-names`.")] = None


GENERATE = msgspec.json.Decoder(GenerateRequest)
COMPAT_GENERATE = msgspec.json.Decoder(CompatGenerateRequest)
VERTEX = msgspec.json.Decoder(VertexRequest)
TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
PROMPT_TOKENIZE = msgspec.json.Decoder(PromptTokenizeRequest)
DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)
