"""TGI's wire types: what the native routes read and write, as msgspec structs.

Types are strict here and nothing else is: ranges, and the order in which TGI reports them, belong to
`validation.py`. The bounds stand in `extra_json_schema`, so that the OpenAPI document has them without
msgspec enforcing them in an order of its own. Optional fields take null for "the default"; unknown fields are
ignored. Field order is the order of the keys on the wire.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

FREQUENCY_PENALTY_BOUND = 2.0
MAX_SEED = 2**64 - 1

FinishReasonName = Literal["length", "eos_token", "stop_sequence"]


def _field(description: str, **schema: Any) -> Meta:
    """Describe a field for the OpenAPI document only."""
    return Meta(description=description, extra_json_schema=schema or None)


_Unsigned = Annotated[int, Meta(ge=0)]  # a negative one is a wrong type in TGI, not a wrong value


class Grammar(Struct, frozen=True):
    """A constraint on the output; `type` says how `value` is read."""

    type: Literal["json", "json_object", "json_schema", "regex"]
    value: Annotated[Any, _field('JSON Schema, text that holds one, {"schema": ...}, or a regex.')]


class GenerateParameters(Struct, frozen=True, kw_only=True):
    """How to generate. Every field may be absent or null."""

    adapter_id: Annotated[str | None, _field("LoRA adapter; refused: no adapters are served.")] = None
    best_of: Annotated[
        _Unsigned | None, _field("Sequences to generate, of which the likeliest is returned (default 1).")
    ] = None
    temperature: Annotated[
        float | None, _field("Divides the logits; not 1 means sampling (default 1).", exclusiveMinimum=0)
    ] = None
    repetition_penalty: Annotated[
        float | None, _field("Multiplicative, over prompt and output (default 1).", exclusiveMinimum=0)
    ] = None
    frequency_penalty: Annotated[
        float | None,
        _field(
            "Subtracted from a token's logit for each time it is in the output (default 0).",
            minimum=-FREQUENCY_PENALTY_BOUND,
            maximum=FREQUENCY_PENALTY_BOUND,
        ),
    ] = None
    top_k: Annotated[int | None, _field("Draw among the k likeliest tokens.", exclusiveMinimum=0)] = None
    top_p: Annotated[
        float | None,
        _field("Draw among the likeliest tokens of this mass.", exclusiveMinimum=0, exclusiveMaximum=1),
    ] = None
    typical_p: Annotated[
        float | None,
        _field("Draw among the most typical tokens of this mass.", exclusiveMinimum=0, exclusiveMaximum=1),
    ] = None
    do_sample: Annotated[
        bool | None, _field("Sample (default false; without `parameters` at all, true).")
    ] = None
    max_new_tokens: Annotated[
        _Unsigned | None, _field("Most tokens to generate (default: fill the context).", minimum=1)
    ] = None
    return_full_text: Annotated[
        bool | None, _field("Put `inputs` in front of the text (default: true on `POST /` alone).")
    ] = None
    stop: Annotated[
        list[str] | None,
        _field("Strings that end the text, kept in it.", maxItems=4),
    ] = None
    truncate: Annotated[_Unsigned | None, _field("Keep this many tokens of the prompt's end.", minimum=1)] = (
        None
    )
    watermark: Annotated[bool | None, _field("Accepted and ignored.")] = None
    details: Annotated[bool | None, _field("Return `details` (default false).")] = None
    decoder_input_details: Annotated[
        bool | None, _field("Return the prompt's tokens, if the server allows; implies `details`.")
    ] = None
    seed: Annotated[_Unsigned | None, _field("Same seed, same text (default: random).", maximum=MAX_SEED)] = (
        None
    )
    top_n_tokens: Annotated[
        _Unsigned | None,
        _field("Likeliest tokens to report a step (default 0).", maximum=5),
    ] = None
    grammar: Annotated[Grammar | None, _field("Constraint on the output.")] = None


class GenerateRequest(Struct, frozen=True):
    """Body of `/generate` and `/generate_stream`."""

    inputs: Annotated[str, _field("The prompt.", minLength=1)]
    parameters: GenerateParameters | None = None


class CompatGenerateRequest(Struct, frozen=True):
    """Body of `POST /`: a GenerateRequest that says itself whether to stream."""

    inputs: Annotated[str, _field("The prompt.", minLength=1)]
    parameters: GenerateParameters | None = None
    stream: bool | None = None


class VertexRequest(Struct, frozen=True):
    """Body of `/vertex`; an instance is a GenerateRequest or a chat request."""

    instances: Annotated[
        list[msgspec.Raw],
        _field("Each a GenerateRequest, or a chat request; `stream` is ignored.", minItems=1),
    ]


class VertexResponse(Struct, frozen=True):
    """The texts, in the order of the instances."""

    predictions: list[str]


class Token(Struct, frozen=True, gc=False):
    """One generated token."""

    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillToken(Struct, frozen=True, gc=False):
    """One token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class BestOfSequence(Struct, frozen=True, kw_only=True):
    """A sequence that lost under `best_of`."""

    generated_text: str
    finish_reason: FinishReasonName
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class Details(Struct, frozen=True, kw_only=True):
    """What happened, token by token."""

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
    """Body of `/tokenize` as TGI takes it; special tokens are added."""

    inputs: Annotated[str, _field("Text to tokenise.")]


class PromptTokenizeRequest(Struct, frozen=True):
    """Body of `/tokenize` as vLLM takes it; with `messages` instead it is a chat request."""

    prompt: Annotated[str, _field("Text to tokenise.")]
    add_special_tokens: Annotated[bool | None, _field("Whether to add BOS and the like (default true).")] = (
        None
    )


class TokenCount(Struct, frozen=True):
    """Answer of `/tokenize` to `prompt` or `messages`."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(Struct, frozen=True):
    """Body of `/detokenize`."""

    tokens: Annotated[list[int], _field("Token ids, each below the vocabulary's size.")]


class DetokenizeResponse(Struct, frozen=True):
    """The ids' text, special tokens included."""

    prompt: str


class Info(Struct, frozen=True, kw_only=True):
    """What is served, and its limits."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    model_dtype: str
    model_device_type: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    max_batch_total_tokens: int
    max_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


class ErrorResponse(Struct, frozen=True):
    """Envelope of every native error."""

    error: str
    error_type: str


GENERATE = msgspec.json.Decoder(GenerateRequest)
COMPAT_GENERATE = msgspec.json.Decoder(CompatGenerateRequest)
VERTEX = msgspec.json.Decoder(VertexRequest)
TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
PROMPT_TOKENIZE = msgspec.json.Decoder(PromptTokenizeRequest)
DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)
