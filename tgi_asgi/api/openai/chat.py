"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any

import msgspec

from tgi_asgi.api.call import Call, Conversation, Generation, Job, Renderer, ToolChoice
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.limits import Limits
from tgi_asgi.api.openai.choice import ChatChoice
from tgi_asgi.api.openai.logprobs import ChatLogprobs, TokenNames
from tgi_asgi.api.openai.params import check_common, job_of
from tgi_asgi.api.openai.render import CompletionRenderer
from tgi_asgi.api.openai.schema import CHAT_DECODER, ChatRequest, ContentPart, Message
from tgi_asgi.api.openai.tools import read_choice, read_tools
from tgi_asgi.api.parse import decode_json, refuse
from tgi_asgi.api.tools import Tool
from tgi_asgi.errors import Forbidden, ToolError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_OWN_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)
_COPIED = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")


def parse_chat(body: bytes, exchange: Exchange) -> Call:
    """Read a chat request.

    Raises:
        InvalidRequest, ToolError, Forbidden: a field is refused; `param` names it.
    """
    request = decode_json(body, CHAT_DECODER)
    is_compat = exchange.context.settings.tgi_compat
    job = chat_job(request, exchange)

    def render(generation: Generation) -> Renderer:
        [prepared] = generation.jobs
        names = TokenNames(generation.served.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        choices = [
            ChatChoice(
                prepared.reading,
                ChatLogprobs(names) if job.sampling.logprobs is not None else None,
                echo=prepared.prompt.echo,
                is_named=job.tools is not None and job.tools.is_named,
                is_compat=is_compat,
            )
            for _ in range(job.n)
        ]
        return CompletionRenderer(generation, request, choices, is_compat=is_compat)

    return Call(jobs=[job], render=render, model=request.model, stream=bool(request.stream))


def chat_job(request: ChatRequest, exchange: Exchange) -> Job:
    """Return what a chat asks of the engine.

    Raises:
        InvalidRequest, ToolError, Forbidden: as `parse_chat`.
    """
    settings, info = exchange.context.settings, exchange.context.ready().info
    is_compat = settings.tgi_compat
    limits = Limits.of(settings, is_tgi=is_compat)
    tools, choice = _tools(request, is_compat=is_compat)  # before response_format: TGI's words come first
    check_common(request, limits, info, is_compat=is_compat)
    max_tokens, logprobs = _check_chat(request, limits, is_compat=is_compat)
    return Job(
        prompt=read_conversation(request, tools),
        n=request.n or 1,
        max_tokens=max_tokens,
        tools=choice,
        reads_reasoning=request.separate_reasoning is not False,
        shows_reasoning=request.include_reasoning is not False,
        **job_of(request, info, settings, logprobs),
    )


def read_conversation(request: ChatRequest, tools: list[Tool] | None = None) -> Conversation:
    """Return the messages of a chat and what belongs to them.

    Raises:
        InvalidRequest: a message, a tool or a template option is refused.
    """
    tools = read_tools(request.tools) if tools is None else tools
    if not request.messages:
        refuse("messages", "`messages` must have at least one message")
    return Conversation(
        [_message(message, f"messages[{i}]") for i, message in enumerate(request.messages)],
        tools=[tool.for_template() for tool in tools] or None,
        offers_tools=request.tool_choice != "none",
        variables=_variables(request),
        is_continued=_is_continued(request),
        adds_turn=request.add_generation_prompt is not False,
        adds_special_tokens=bool(request.add_special_tokens),
        echoes=bool(request.echo),
        tool_prompt=request.tool_prompt,
    )


def _tools(request: ChatRequest, *, is_compat: bool) -> tuple[list[Tool], ToolChoice | None]:
    if is_compat and request.tools is not None and request.response_format is not None:
        raise ToolError("Grammar and tools are mutually exclusive", param="tools")
    tools = read_tools(request.tools)
    for name in ("functions", "function_call"):
        if getattr(request, name) not in (None, [], "none"):
            refuse(
                name, f"`{name}` is not supported; OpenAI has replaced it by `tools`", "unsupported_parameter"
            )
    if any(modality != "text" for modality in request.modalities or ()):
        refuse("modalities", "`modalities` may hold `text` only", "unsupported_parameter")
    if request.audio is not None:
        refuse("audio", "`audio` is not supported", "unsupported_parameter")
    choice = request.tool_choice
    is_name = isinstance(choice, str) and choice not in ("auto", "none", "required")
    if is_compat and is_name and tools and all(tool.name != choice for tool in tools):
        raise ToolError(f"Tool with name {choice} not found", param="tool_choice")
    if is_compat and not tools:
        return [], None
    is_parallel = request.parallel_tool_calls is not False and not is_compat
    return tools, read_choice(tools, choice, is_parallel=is_parallel)


def _check_chat(request: ChatRequest, limits: Limits, *, is_compat: bool) -> tuple[int | None, int | None]:
    """Check chat's own fields; return max_tokens and how many log-probabilities are wanted."""
    field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    max_tokens: int | None = getattr(request, field)
    if max_tokens == 0:
        refuse(field, f"`{field}` must be at least 1, got 0")
    top = request.top_logprobs or 0
    if top > limits.top_logprobs:
        refuse("top_logprobs", f"`top_logprobs` must be at most {limits.top_logprobs}, got {top}")
    if top and not request.logprobs and not is_compat:
        refuse("top_logprobs", "`top_logprobs` is only allowed with `logprobs: true`")
    if request.chat_template is not None:
        raise Forbidden("`chat_template` is not accepted from requests")
    return max_tokens, top if request.logprobs else None


def _message(message: Message, path: str) -> dict[str, Any]:
    role = message.role
    if role not in ROLES:
        refuse(f"{path}.role", f"`{path}.role` must be one of {', '.join(sorted(ROLES))}, got {role[:40]!r}")
    content: str | list[Any] | None = message.content
    if content is None and role != "assistant":
        refuse(f"{path}.content", f"`{path}.content` is required with role `{role}`")
    if isinstance(content, list):
        content = [_part(part, f"{path}.content[{i}]", role) for i, part in enumerate(content)]
    if message.function_call is not None:
        where = f"{path}.function_call"
        refuse(where, f"`{where}` is not supported; use `tool_calls`", "unsupported_parameter")
    if role == "tool" and message.tool_call_id is None:
        refuse(f"{path}.tool_call_id", f"`{path}.tool_call_id` is required with role `tool`")
    result: dict[str, Any] = {"role": "tool" if role == "function" else role, "content": content}
    for name in _COPIED:
        value = getattr(message, name)
        if value is not None:
            result[name] = value
    if message.tool_calls:
        result["tool_calls"] = msgspec.to_builtins(message.tool_calls)
    return result


def _part(part: ContentPart, path: str, role: str) -> str:
    if part.type == "text" and part.text is not None:
        return part.text
    if part.type == "refusal" and role == "assistant" and part.refusal is not None:
        return part.refusal
    if part.type in ("text", "refusal"):
        refuse(f"{path}.{part.type}", f"`{path}.{part.type}` is required")
    refuse(
        f"{path}.type",
        f"`{path}.type` must be `text`: the model reads nothing else, got {part.type[:40]!r}",
        "invalid_value",
    )


def _is_continued(request: ChatRequest) -> bool:
    """Return whether the last message is left open, for the model to go on with it."""
    last = request.messages[-1]
    is_assistant = last.role == "assistant"
    if request.continue_final_message:
        if request.add_generation_prompt:
            refuse(
                "continue_final_message",
                "`continue_final_message` and `add_generation_prompt` exclude each other",
            )
        if not is_assistant:
            refuse("continue_final_message", "`continue_final_message` needs a last message of the assistant")
        return True
    if request.continue_final_message is False or request.add_generation_prompt:
        return False
    return is_assistant and bool(last.content) and not last.tool_calls


def _variables(request: ChatRequest) -> dict[str, Any]:
    """Return the template's further variables."""
    variables: dict[str, Any] = {"documents": request.documents}
    effort = request.reasoning_effort
    if effort is not None:
        if effort not in EFFORTS:
            refuse("reasoning_effort", f"`reasoning_effort` must be one of {', '.join(EFFORTS)}")
        variables |= effort_variables(effort)
    for name, value in (request.chat_template_kwargs or {}).items():
        if name in _OWN_VARIABLES:
            refuse(
                f"chat_template_kwargs.{name}",
                f"`chat_template_kwargs` must not set `{name}`: it is a field of its own",
            )
        variables[name] = value
    return variables


def effort_variables(effort: str) -> dict[str, Any]:
    """Return what tells a template how much the model should think."""
    off = {"enable_thinking": False} if effort == "none" else {}
    return {"reasoning_effort": effort, **off}
