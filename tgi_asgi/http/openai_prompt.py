"""From messages or prompts to token ids. Slow for long inputs: everything here runs in a worker thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from tgi_asgi.errors import InvalidRequest, TemplateError
from tgi_asgi.http.context import Served
from tgi_asgi.http.openai_params import refuse
from tgi_asgi.http.openai_schema import ChatRequest, CompletionRequest, ContentPart, Message
from tgi_asgi.settings import Settings
from tgi_asgi.text.tools import add_tool_prompt, shorten_ids, spell_out

if TYPE_CHECKING:
    from tgi_asgi.text.chat.template import ChatTemplate

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_OWN_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)
_TAIL_CHARS = 64
_NO_TEMPLATE = (
    "The model has no chat template: use /v1/completions, or start the server with --tokenizer-config-path "
    "and a tokenizer_config.json that has a chat_template"
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready for the engine.

    Attributes:
        ids: its tokens.
        echo: the text that comes before the answer's, where the request asks for that.
        text: the prompt as text, for text offsets; None where no one needs it.
        num_characters: of the prompt as text, where it came as text.
    """

    ids: list[int]
    echo: str = ""
    text: str | None = None
    num_characters: int = 0
    tail: str = ""  # the end of a chat's prompt, which may open a reasoning section


def chat_prompt(request: ChatRequest, served: Served, settings: Settings) -> Prompt:
    """Render and tokenise a conversation.

    Raises:
        InvalidRequest, TemplateError: as `chat_text`.
    """
    text = chat_text(request, served, settings)
    ids = served.tokenizer.encode(
        text.source, add_special_tokens=bool(request.add_special_tokens), is_marked=text.is_marked
    )
    echo = ""
    if request.echo and _is_continued(request):
        assert served.chat_template is not None, "the messages were rendered"
        separator = _separator(served.chat_template, settings)
        content = _content(request.messages[-1], f"messages[{len(request.messages) - 1}]", separator or "")
        echo = content if isinstance(content, str) else ""
    return Prompt(ids, echo, num_characters=len(text.shown), tail=text.shown[-_TAIL_CHARS:])


@dataclass(frozen=True, slots=True)
class ChatText:
    """A rendered conversation.

    Attributes:
        shown: as it reads.
        source: what to encode: the same, unless `is_marked`.
        is_marked: the messages hold special tokens as text; those that are to act as such are marked.
    """

    shown: str
    source: str
    is_marked: bool = False


def chat_text(request: ChatRequest, served: Served, settings: Settings) -> ChatText:
    """Render a conversation.

    Raises:
        InvalidRequest: a message or a template option is wrong; `param` has its path.
        TemplateError: there is no template, or it refused the messages.
    """
    try:
        return _render(request, served, settings)
    except TemplateError as error:
        if error.param is None:
            error.param = "messages"
        raise
    except RecursionError:  # what the decoder just accepts may be too deep to be copied
        raise InvalidRequest("The request body is nested too deeply") from None


def _render(request: ChatRequest, served: Served, settings: Settings) -> ChatText:
    template = served.chat_template
    if template is None:
        raise TemplateError(_NO_TEMPLATE)
    if not request.messages:
        refuse("messages", "`messages` must have at least one message")
    separator = _separator(template, settings)
    has_developer = template.mentions("developer")
    messages = [
        _message(message, f"messages[{i}]", separator, has_developer)
        for i, message in enumerate(request.messages)
    ]
    tools = _tools(request)
    if not (template.mentions("tools") or template.mentions("tool_calls")):
        messages = spell_out(messages, None if request.tool_choice == "none" else tools)
    messages = shorten_ids(messages, template.source)
    is_continued = _is_continued(request)
    if tools and request.tool_prompt and request.tool_choice != "none" and not is_continued:
        messages = add_tool_prompt(messages, request.tool_prompt)
    # What a client gives to the template, under the names that templates have for it.
    given = {"tools": tools, "documents": request.documents, **_variables(request)}
    guard = served.tokenizer.guard
    is_marked = not settings.chat_special_tokens and guard.is_needed(messages, given)
    if is_marked:
        messages, given = guard.protect(messages), guard.protect(given)
    text = template.render(
        messages,
        add_generation_prompt=not is_continued and request.add_generation_prompt is not False,
        continue_final_message=is_continued,
        **given,
    )
    return ChatText(*guard.marks(text), is_marked=True) if is_marked else ChatText(text, text)


def completion_prompts(request: CompletionRequest, served: Served) -> list[Prompt]:
    """Tokenise the prompts of a completion request, whatever their form.

    The list of prompts must not be empty (`count_prompts` sees to that).

    Raises:
        InvalidRequest: a prompt is empty, of a wrong type, or holds an id that is no token.
    """
    prompt = request.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [_completion_prompt(prompt, "prompt", request, served)]
    for i, item in enumerate(prompt):
        if type(item) is not type(prompt[0]):
            refuse(f"prompt[{i}]", f"`prompt[{i}]` must be of the same type as `prompt[0]`")
    return [_completion_prompt(item, f"prompt[{i}]", request, served) for i, item in enumerate(prompt)]


def count_prompts(request: CompletionRequest) -> int:
    """Return how many prompts a completion request has, without looking at each."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return 1
    if not prompt:
        refuse("prompt", "`prompt` must not be empty")
    return 1 if isinstance(prompt[0], int) else len(prompt)


def _completion_prompt(item: Any, path: str, request: CompletionRequest, served: Served) -> Prompt:
    needs_text = request.echo or request.logprobs is not None
    if isinstance(item, str):
        # Null means the default, and completions add the tokenizer's BOS by default.
        ids = served.tokenizer.encode(item, add_special_tokens=request.add_special_tokens is not False)
        text = item
    elif isinstance(item, list):
        ids = _checked_ids(item, path, served.info.vocab_size)
        is_shown = request.skip_special_tokens is False
        text = served.tokenizer.decode(ids, skip_special_tokens=not is_shown) if needs_text else ""
    else:
        refuse(path, f"`{path}` must be a string or a list of token ids")
    if not ids:
        refuse(path, f"`{path}` must not be empty")
    return Prompt(ids, text if request.echo else "", text if needs_text else None, len(text))


def _checked_ids(item: list[Any], path: str, vocab_size: int) -> list[int]:
    for i, token_id in enumerate(item):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            where = f"{path}[{i}]"
            refuse(where, f"`{where}` must be a token id in 0..{vocab_size - 1}, got {str(token_id)[:40]}")
    return item


def _separator(template: ChatTemplate, settings: Settings) -> str | None:
    """Return what stands between the parts of a content; None: the template is given the list."""
    if settings.tgi_compat:
        return ""
    return None if template.iterates_parts else "\n"


def _message(message: Message, path: str, separator: str | None, has_developer: bool) -> dict[str, Any]:
    """Return a message as templates take it: plain dicts, no absent keys."""
    role = message.role
    if role not in _ROLES:
        refuse(f"{path}.role", f"`{path}.role` must be one of {', '.join(sorted(_ROLES))}, got {role[:40]!r}")
    if role == "developer" and not has_developer:
        role = "system"
    if role == "function":
        role = "tool"
    result: dict[str, Any] = {"role": role, "content": _content(message, path, separator)}
    if message.function_call is not None:
        where = f"{path}.function_call"
        refuse(where, f"`{where}` is not supported; use `tool_calls`", "unsupported_parameter")
    if message.role == "tool" and message.tool_call_id is None:
        refuse(f"{path}.tool_call_id", f"`{path}.tool_call_id` is required with role `tool`")
    for name in ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking"):
        value = getattr(message, name)
        if value is not None:
            result[name] = value
    if message.tool_calls:
        result["tool_calls"] = msgspec.to_builtins(message.tool_calls)
    return result


def _content(message: Message, path: str, separator: str | None) -> str | list[dict[str, str]] | None:
    content = message.content
    if content is None:
        if message.role != "assistant":
            refuse(f"{path}.content", f"`{path}.content` is required with role `{message.role}`")
        return None
    if isinstance(content, str):
        return content
    texts = [_part(part, f"{path}.content[{i}]", message.role) for i, part in enumerate(content)]
    if len(texts) == 1:  # the same tokens as for the plain string
        return texts[0]
    if separator is None:
        return [{"type": "text", "text": text} for text in texts]
    return separator.join(texts)


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
    is_assistant = request.messages[-1].role == "assistant"
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
    last = request.messages[-1]
    return is_assistant and bool(last.content) and not last.tool_calls


def _tools(request: ChatRequest) -> list[dict[str, Any]] | None:
    if not request.tools:
        return None
    tools = msgspec.to_builtins(request.tools)
    for i, tool in enumerate(tools):
        if tool["function"] is None:
            refuse(f"tools[{i}].function", f"`tools[{i}].function` is required")
        tool["function"] = {name: value for name, value in tool["function"].items() if value is not None}
    return list(tools)


def _variables(request: ChatRequest) -> dict[str, Any]:
    """Return the template's further variables."""
    variables: dict[str, Any] = {}
    effort = request.reasoning_effort
    if effort is not None:
        if effort not in _EFFORTS:
            refuse("reasoning_effort", f"`reasoning_effort` must be one of {', '.join(_EFFORTS)}")
        variables["reasoning_effort"] = effort
        if effort == "none":
            variables["enable_thinking"] = False
    for name, value in (request.chat_template_kwargs or {}).items():
        if name in _OWN_VARIABLES:
            raise InvalidRequest(
                f"`chat_template_kwargs` must not set `{name}`: it is a field of its own",
                param=f"chat_template_kwargs.{name}",
            )
        variables[name] = value
    return variables
