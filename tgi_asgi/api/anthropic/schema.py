"""The bodies of Anthropic's requests, as msgspec reads them."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from tgi_asgi.api.parse import Fraction, Natural, Salt


class ClientTool(Struct):
    """A function that the model may call, or one of Anthropic's types; those hosted elsewhere are skipped."""

    name: str | None = None  # toolsets, which are hosted, have none
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None


class Turn(Struct):
    """One turn of the conversation: text, or a list of blocks."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    # Of a system turn: until when the model is shown its text, and settings from this turn on.
    clear_at: Literal["never", "next_user_message"] | None = None
    output_config: dict[str, Any] | None = None


class CountRequest(Struct, kw_only=True):
    """Body of `POST /v1/messages/count_tokens`: the fields that determine the prompt."""

    messages: list[Turn]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[ClientTool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class Compaction(Struct):
    """A request for a summary of the conversation instead of an answer."""

    type: Literal["summarize"]
    instructions: str | None = None  # what to ask the model instead of this server's own request


class MessagesRequest(CountRequest, kw_only=True):
    """Body of `POST /v1/messages`."""

    max_tokens: Natural  # 0 only reads the prompt, so that later requests find it in the cache
    temperature: Fraction | None = None
    top_p: Fraction | None = None
    top_k: Natural | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    thread: dict[str, Any] | None = None  # a conversation to be stored by the server
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None  # older name of `output_config.format`
    cache_salt: Salt | None = None
    compaction: Compaction | None = None
