"""`POST /v1/chat/completions`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tgi_asgi.api.call import Call, Generation, Renderer
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.job import Conversation, Job, ToolChoice
from tgi_asgi.api.limits import Limits
from tgi_asgi.api.openai.choice import ChatChoice, WholeCallsChoice
from tgi_asgi.api.openai.logprobs import ChatLogprobs, TokenNames
from tgi_asgi.api.openai.params import check_common, constraint_of, job_of, thinking_budget
from tgi_asgi.api.openai.render import CompletionRenderer
from tgi_asgi.api.openai.schema import (
    CHAT_DECODER,
    ChatRequest,
    ContentPart,
    ImageUrl,
    Message,
    Thinking,
    ToolCall,
)
from tgi_asgi.api.openai.tools import add_call_ids, read_choice, read_tools
from tgi_asgi.api.parse import OMITTED_IMAGE, check_ranges, decode_json, refuse_field
from tgi_asgi.api.prompt_images import Images
from tgi_asgi.api.prompt_text import leaves_open, thinking_variables
from tgi_asgi.api.tools import Tool
from tgi_asgi.errors import Forbidden, ToolError
from tgi_asgi.settings import OWN_VARIABLES
from tgi_asgi.text.chat.message import ChatMessage

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_COPIED = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")


def parse_chat(body: bytes, exchange: Exchange) -> Call:
    """Parse a chat request."""
    request = decode_json(body, CHAT_DECODER)
    is_compat = exchange.context.settings.tgi_compat
    if request.functions:
        names = {**exchange.dialect.names, "tools": "functions", "tool_choice": "function_call"}
        exchange.dialect = dataclasses.replace(exchange.dialect, names=names, nests_tools=False)
    job = chat_job(request, exchange)
    # In TGI's chats, all calls are of functions.
    own = () if is_compat else request.tools or ()
    is_mistral_s = b"mistral" in (exchange.header(b"user-agent") or b"").lower()
    kind = WholeCallsChoice if is_mistral_s and not is_compat else ChatChoice
    custom = {entry.custom.name for entry in own if entry.type == "custom" and entry.custom is not None}

    def render(generation: Generation) -> Renderer:
        [prepared] = generation.jobs
        names = TokenNames(generation.served.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        choices = [
            kind(
                prepared.reading,
                ChatLogprobs(names) if job.sampling.logprobs is not None else None,
                echo=prepared.prompt.echo,
                tools=job.tools,
                is_alone=job.n == 1,
                is_compat=is_compat,
                custom=custom,
                is_function=bool(request.functions),
            )
            for _ in range(job.n)
        ]
        return CompletionRenderer(generation, request, choices, is_compat=is_compat)

    return Call(jobs=[job], render=render, model=request.model, stream=bool(request.stream))


def chat_job(request: ChatRequest, exchange: Exchange) -> Job:
    """Return the job of a chat."""
    settings, info = exchange.context.settings, exchange.context.ready().info
    is_compat = settings.tgi_compat
    limits = Limits.of(settings, is_tgi=is_compat)
    tools, choice = _tools(request, is_compat=is_compat)  # before response_format, as TGI's errors come first
    check_common(request, limits, info, is_compat=is_compat)
    max_tokens, logprobs = _check_chat(request, limits, is_compat=is_compat)
    images = exchange.context.ready().new_images()
    prompt = read_conversation(request, tools, images, is_compat=is_compat)
    constraint = constraint_of(request)
    job = job_of(request, prompt, info, settings, logprobs=logprobs, constraint=constraint)
    return dataclasses.replace(
        job,
        n=request.n or 1,
        max_tokens=max_tokens,
        tools=choice,
        reads_reasoning=request.separate_reasoning is not False,
        shows_reasoning=request.include_reasoning is not False,
        reasoning_budget=thinking_budget(request, request.thinking),
    )


def read_conversation(
    request: ChatRequest,
    tools: list[Tool] | None = None,
    images: Images | None = None,
    *,
    is_compat: bool = False,
) -> Conversation:
    """Return the conversation of a chat request.

    Args:
        images: Collects the images; None if the model does not accept images.
        is_compat: Whether, as in TGI, roles are up to the template.

    Raises:
        InvalidRequest: if a message, a tool or a template option is refused.
    """
    tools = read_tools(request.tools) if tools is None else tools
    if not request.messages:
        refuse_field("messages", "must have at least one message")
    messages = [
        _message(message, i, images, is_compat=is_compat) for i, message in enumerate(request.messages)
    ]
    add_call_ids(messages)
    return Conversation(
        messages,
        tools=[tool.for_template() for tool in tools] or None,
        offers_tools=request.tool_choice != "none",
        variables=_variables(request),
        is_continued=_is_continued(request, messages),
        adds_turn=request.add_generation_prompt is not False,
        adds_special_tokens=request.add_special_tokens,
        echoes=bool(request.echo),
        tool_prompt=request.tool_prompt,
        images=images,
    )


def _tools(request: ChatRequest, *, is_compat: bool) -> tuple[list[Tool], ToolChoice | None]:
    if is_compat and request.tools is not None and request.response_format is not None:
        raise ToolError("Grammar and tools are mutually exclusive", param="tools")
    tools = read_tools(request.tools)
    if is_compat and request.functions:
        refuse_field("functions", "is not supported; TGI has only `tools`", "unsupported_parameter")
    if request.function_call not in (None, "none") and not request.functions:
        refuse_field("function_call", "is only allowed with `functions`")
    if any(modality != "text" for modality in request.modalities or ()):
        refuse_field("modalities", "may hold `text` only", "unsupported_parameter")
    if is_compat and not tools:
        return [], None
    is_parallel = request.parallel_tool_calls is not False and not is_compat
    offered = {entry.type for entry in request.tools or ()}
    return tools, read_choice(
        tools, request.tool_choice, offered=offered, is_parallel=is_parallel, is_compat=is_compat
    )


def _check_chat(request: ChatRequest, limits: Limits, *, is_compat: bool) -> tuple[int | None, int | None]:
    """Check the fields that only chats have; return max_tokens and the number of log-probabilities."""
    field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    max_tokens: int | None = getattr(request, field)
    if max_tokens == 0:
        refuse_field(field, "must be at least 1, got 0")
    top = request.top_logprobs or 0
    if top > limits.top_logprobs:
        refuse_field("top_logprobs", f"must be at most {limits.top_logprobs}, got {top}")
    if top and not request.logprobs and not is_compat:
        refuse_field("top_logprobs", "is only allowed with `logprobs: true`")
    if request.chat_template is not None:
        raise Forbidden("`chat_template` is not accepted from requests", param="chat_template")
    return max_tokens, top if request.logprobs else None


def _message(message: Message, index: int, images: Images | None, *, is_compat: bool) -> ChatMessage:
    role, content, path = message.role, message.content, f"messages[{index}]"
    if role not in ROLES and not is_compat:
        refuse_field(f"{path}.role", f"must be one of {', '.join(sorted(ROLES))}, got {role[:40]!r}")
    if content is None and role != "assistant":
        refuse_field(f"{path}.content", f"is required with role `{role}`")
    result: ChatMessage = {"role": "tool" if role == "function" else role, "content": content}
    if isinstance(content, list):
        result["content"] = [
            _part(part, f"{path}.content[{i}]", role, images) for i, part in enumerate(content)
        ]
    for name in _COPIED:
        if (value := getattr(message, name)) is not None:
            result[name] = value
    calls = message.tool_calls
    if not calls and message.function_call is not None and role == "assistant":
        # The result gets the id, too (`add_call_ids`). It depends on nothing else, for the prefix cache.
        calls = [ToolCall(message.function_call, f"call_{index}")]
    if calls:
        result["tool_calls"] = [call.for_template() for call in calls]
    return result


def _part(part: ContentPart, path: str, role: str, images: Images | None) -> str | dict[str, str]:
    if part.type == "image_url" and images is not None and role == "user":
        given = part.image_url
        if given is None:
            refuse_field(f"{path}.image_url", "is required")
        return images.add(given.url if isinstance(given, ImageUrl) else given, f"{path}.image_url")
    if part.type == "image_url" and role in ("tool", "function"):  # agents send on what their tools return
        return OMITTED_IMAGE
    if part.type == "text" and part.text is not None:
        return part.text
    if part.type == "refusal" and role == "assistant" and part.refusal is not None:
        return part.refusal
    if part.type in ("text", "refusal"):
        refuse_field(f"{path}.{part.type}", "is required")
    if images is None:
        known = "`text`: the model reads nothing else"
    elif role == "user":
        known = "`text` or `image_url`"
    else:
        known = "`text`: only the user's messages may have images"
    rule = f"must be {known}, got {part.type[:40]!r}"
    refuse_field(f"{path}.type", rule, "invalid_value")


def _is_continued(request: ChatRequest, messages: list[ChatMessage]) -> bool:
    """Return whether the last message is left open for the model to continue."""
    wanted, field = request.continue_final_message, "continue_final_message"
    if wanted and request.add_generation_prompt:
        refuse_field(field, "and `add_generation_prompt` exclude each other")
    if wanted and messages[-1]["role"] != "assistant":
        refuse_field(field, "needs a last message of the assistant")
    if wanted is None and not request.add_generation_prompt:
        return leaves_open(messages)
    return bool(wanted)


def _variables(request: ChatRequest) -> dict[str, Any]:
    """Return the template's additional variables."""
    given = request.chat_template_kwargs or {}
    thinks = _thinks(request)
    if thinks is not None:
        given = {**thinking_variables(thinks), **given}
    efforts = template_variables(request.reasoning_effort, "reasoning_effort", given)
    return {"documents": request.documents, **efforts}


def _thinks(request: ChatRequest) -> bool | None:
    """Return whether a request's own switch turns thinking on; None if it has none."""
    wanted = request.thinking
    if isinstance(wanted, Thinking):
        check_ranges(wanted, "thinking.")
        wanted = None if wanted.type in (None, "auto") else wanted.type != "disabled"
    return request.enable_thinking if wanted is None else wanted


def template_variables(effort: str | None, field: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the template variables that control thinking, and those that the client adds.

    Raises:
        InvalidRequest: if `field` is not a valid effort, or a variable is reserved for the server.
    """
    given = given or {}
    for name in OWN_VARIABLES & given.keys():
        refuse_field(f"chat_template_kwargs.{name}", "is not a client's to set")
    if effort is None:
        return {**given}
    if effort not in _EFFORTS:
        refuse_field(field, f"must be one of {', '.join(_EFFORTS)}")
    return {**thinking_variables(effort != "none", effort), **given}
