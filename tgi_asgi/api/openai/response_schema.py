"""The wire types of `/v1/responses`.

Fields that would change the answer (hosted prompts, background work) are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tgi_asgi.api.openai.schema import TextRequest
from tgi_asgi.api.parse import Foreign, Natural, Positive, Refused, Undocumented, range_of

Item = dict[str, Any]  # of the input or output


class ReasoningOptions(Struct):
    """How much the model should think."""

    effort: str | None = None
    summary: str | None = None  # whatever it asks for, the summary is the whole reasoning
    generate_summary: str | None = None  # the first name of `summary`

    def __post_init__(self) -> None:
        self.summary = self.summary or self.generate_summary


class TextFormat(Struct, omit_defaults=True):
    """Format that the answer's text must match; echoed as it was given."""

    type: str
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Struct):
    """Options of the answer's text."""

    format: TextFormat | None = None
    verbosity: str | None = None  # echoed, but not used


class PromptCacheOptions(Struct):
    """How the prompt is cached: always as far as there is room; only `prewarm` makes a difference."""

    prewarm: bool | None = None


class ConfigurationUpdate(Struct):
    """An item that sets the format or the effort of all answers after it, up to the next such item."""

    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None


_Key = Annotated[str, Meta(max_length=64)]
_Value = Annotated[str, Meta(max_length=512)]
Metadata = Annotated[dict[_Key, _Value], Meta(max_length=16)]


class ConversationName(Struct):
    """A conversation, named by an object as in the answer."""

    id: str


class ResponsesRequest(TextRequest, kw_only=True):
    """Body of `POST /v1/responses`."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    top_logprobs: Annotated[int, range_of(minimum=0, maximum=20)] | None = None
    include: list[str] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None  # SGLang's name for include_reasoning
    truncation: Literal["auto", "disabled"] | None = None  # always disabled: what is too long is refused
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationName | None = None
    max_tool_calls: Natural | None = None  # of hosted tools, which are never called
    prompt_cache_key: str | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    safety_identifier: str | None = None
    user: str | None = None

    prompt: Refused = None
    background: Refused = None
    previous_response: Refused = None  # vLLM's, like the next
    previous_input_messages: Refused = None

    # Of chats and completions.
    messages: Undocumented = None
    max_tokens: Undocumented = None
    max_completion_tokens: Undocumented = None
    response_format: Undocumented = None
    reasoning_effort: Undocumented = None
    n: Undocumented = None
    best_of: Undocumented = None
    chat_template: Foreign = None
    logprobs: Foreign = None
    echo: Foreign = None
    suffix: Foreign = None
    continue_final_message: Foreign = None
    documents: Foreign = None
    functions: Foreign = None
    tool_prompt: Foreign = None
    audio: Foreign = None
    prompt_token_ids: Foreign = None
    input_ids: Foreign = None

    @property
    def only_prewarms(self) -> bool:
        """Whether the prompt shall only be read into the cache, without an answer."""
        return self.prompt_cache_options is not None and self.prompt_cache_options.prewarm is True

    def includes(self, what: str) -> bool:
        """Return whether the answer should have something that it has only if it is asked for."""
        return what in (self.include or ())

    @property
    def conversation_id(self) -> str | None:
        """The id of the conversation that the answer continues and is added to."""
        named = self.conversation
        return named.id if isinstance(named, ConversationName) else named

    @property
    def num_logprobs(self) -> int | None:
        """The number of alternatives of each token's log-probability; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.includes("message.output_text.logprobs") else None


class ConversationRequest(Struct):
    """Body of `POST /v1/conversations`."""

    items: list[dict[str, Any]] | None = None
    metadata: Metadata | None = None


class ConversationUpdate(Struct):
    """Body of `POST /v1/conversations/{id}`: the new metadata; null means none."""

    metadata: Metadata | None


class NewItems(Struct):
    """Body of `POST /v1/conversations/{id}/items`."""

    items: list[dict[str, Any]]


DECODER = msgspec.json.Decoder(ResponsesRequest)
