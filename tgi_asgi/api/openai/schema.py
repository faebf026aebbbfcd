"""OpenAI's wire types: the requests of `/v1` as msgspec structs.

Null in an optional field means the default, and unknown fields are ignored; only fields that affect behaviour
are listed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from tgi_asgi.api.parse import (
    Fraction,
    Int,
    Natural,
    Penalty,
    Positive,
    Refused,
    Salt,
    Share,
    Undocumented,
    range_of,
)
from tgi_asgi.api.tools import CUSTOM_INPUT

# -1: without bound.
TokenBudget = Annotated[int, range_of(minimum=-1, maximum=2**63 - 1)]
_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_LISTS = {"type": "array", "items": _IDS, "minItems": 1}
Prompt = Annotated[
    str | list[Any],
    Meta(
        description="A text, a list of texts, token ids, or a list of lists of token ids",
        extra_json_schema={"anyOf": [{"type": "string"}, _TEXTS, _IDS, _LISTS]},
    ),
]
LogitBias = (
    dict[str, float] | Annotated[list[float], Meta(description="With --tgi-compat only: ignored, as in TGI")]
)


class StreamOptions(Struct):
    """What a stream contains in addition to the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(Struct):
    """OpenAI's named schema for a structured answer."""

    schema: dict[str, Any] | None = None
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    """OpenAI's response_format; TGI's, with its content in `value`; or llama.cpp's, with it in `schema`."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    value: dict[str, Any] | str | None = None
    schema: dict[str, Any] | str | None = None


class TextRequest(Struct, kw_only=True):
    """The fields of all requests that generate text: OpenAI's first, then other servers'."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, range_of(minimum=0, maximum=2)] | None = None
    top_p: Fraction | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None

    top_k: Annotated[int, range_of(minimum=-1, maximum=2**63 - 1)] | None = None
    min_p: Fraction | None = None
    typical_p: Share | None = None
    repetition_penalty: Annotated[float, range_of(exclusiveMinimum=0)] | None = None
    min_tokens: Natural | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None  # SGLang's name for include_stop_str_in_output
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, range_of(minimum=-1, maximum=2**63 - 1)] | None = None
    truncation_side: Literal["left"] | None = None  # the end of a prompt is what an answer follows
    priority: int | None = None
    cache_salt: Salt | None = None

    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | str | None = None

    thinking_token_budget: TokenBudget | None = None
    reasoning_budget_tokens: TokenBudget | None = None  # llama.cpp's name for it
    thinking_budget_tokens: TokenBudget | None = None  # its other one
    thinking_budget: TokenBudget | None = None  # DashScope's

    # vLLM's, then SGLang's, then llama.cpp's, then transformers'.
    prompt_logprobs: Refused = None
    allowed_token_ids: Refused = None
    bad_words: Refused = None
    logprob_token_ids: Refused = None
    use_beam_search: Refused = None
    repetition_detection: Refused = None
    logits_processors: Refused = None
    stop_regex: Refused = None
    lora_path: Refused = None
    custom_logit_processor: Refused = None
    lora: Refused = None
    max_new_tokens: Undocumented = None


class CommonRequest(TextRequest, kw_only=True):
    """The fields that chat and text completions share."""

    stream_options: StreamOptions | None = None
    max_tokens: Natural | None = None
    n: Positive | None = None
    response_format: ResponseFormat | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    max_output_tokens: Undocumented = None  # the name in /v1/responses


class ImageUrl(Struct):
    """An image's location: an http(s) or `data:` URL."""

    url: str
    detail: str | None = None  # ignored, because models use a size of their own


class ContentPart(Struct):
    """One part of a message's content: text, or an image if the model accepts images."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | str | None = None


class CalledFunction(Struct, frozen=True):
    """A function and its arguments: JSON in a string; some clients send an object."""

    name: str
    arguments: str | dict[str, Any] | None = None


class CustomCall(Struct):
    """A call of a tool that takes one string."""

    name: str
    input: str


class ToolCall(Struct):
    """One call in an assistant message of the history; a custom tool's call becomes a function call."""

    function: CalledFunction = CalledFunction("")
    id: str | None = None
    type: str = "function"
    custom: CustomCall | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.custom is not UNSET:
            self.function = CalledFunction(self.custom.name, {CUSTOM_INPUT: self.custom.input})
            self.type, self.custom = "function", UNSET
        if not self.function.name:
            raise ValueError("Object missing required field `function`")

    def for_template(self) -> dict[str, Any]:
        """Return it in the form that chat templates expect."""
        # Not by `to_builtins`, which copies arguments, and may need more of the stack than reading them did.
        given = self.function.arguments
        arguments = {} if given is None else {"arguments": given}
        return {"function": {"name": self.function.name, **arguments}, "id": self.id, "type": self.type}


class Message(Struct):
    """One turn of the conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None


class FunctionDefinition(Struct):
    """A function that a model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    arguments: dict[str, Any] | None = None  # name of the parameters in TGI's first clients

    def __post_init__(self) -> None:
        if self.parameters is None:
            self.parameters = self.arguments
        self.arguments = None


class CustomDefinition(Struct):
    """A tool that takes one string."""

    name: str
    description: str | None = None
    format: dict[str, Any] | None = None


class ToolEntry(Struct):
    """One entry of `tools`; tools of other types are hosted elsewhere and skipped."""

    type: str
    function: FunctionDefinition | None = None
    custom: CustomDefinition | None = None


class Thinking(Struct):
    """Whether the model should think, as the APIs of DeepSeek, GLM, Kimi and Doubao have it; and how much."""

    type: Literal["enabled", "disabled", "adaptive", "auto"] | None = None
    budget_tokens: TokenBudget | None = None


class FunctionName(Struct):
    """The choice of a function."""

    name: str


class ChatRequest(CommonRequest, kw_only=True):
    """Body of `POST /v1/chat/completions`.

    OpenAI's older `functions` and `function_call` become `tools` and `tool_choice`, with at most one call.
    """

    messages: list[Message]
    max_completion_tokens: Natural | None = None
    logprobs: bool | None = None
    top_logprobs: Natural | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None  # DashScope's and SiliconFlow's
    thinking: bool | Thinking | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    tools: list[ToolEntry] | None = None
    tool_choice: str | dict[str, Any] | None = None
    tool_prompt: str | None = None  # TGI's text to add after the last message if there are tools
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None  # SGLang's name for include_reasoning
    functions: list[FunctionDefinition] | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None
    modalities: list[str] | None = None

    audio: Refused = None
    prompt_token_ids: Refused = None  # instead of the messages: vLLM's
    input_ids: Refused = None  # the same: SGLang's

    def __post_init__(self) -> None:
        if not self.functions:
            return
        if self.tools:
            raise ValueError("`functions` and `tools` exclude each other")
        self.tools = [ToolEntry("function", each) for each in self.functions]
        choice, self.parallel_tool_calls = self.function_call, False
        self.tool_choice = {"name": choice.name} if isinstance(choice, FunctionName) else choice


class ChatTokenizeRequest(ChatRequest, kw_only=True):
    """Body of `POST /tokenize` in vLLM's form, with messages."""

    return_token_strs: bool | None = None


class CompletionRequest(CommonRequest, kw_only=True):
    """Body of `POST /v1/completions`."""

    prompt: Prompt | None = None  # null, absent or empty: the beginning of a document
    logprobs: Natural | None = None
    echo: bool | None = None
    best_of: Positive | None = None
    suffix: str | None = None

    prompt_embeds: Refused = None
    messages: Undocumented = None  # what other APIs have in place of the prompt
    input: Undocumented = None
    inputs: Undocumented = None


CHAT_DECODER = msgspec.json.Decoder(ChatRequest)
CHAT_TOKENIZE_DECODER = msgspec.json.Decoder(ChatTokenizeRequest)
COMPLETION_DECODER = msgspec.json.Decoder(CompletionRequest)
