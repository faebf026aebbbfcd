"""The text of a prompt: a conversation rendered by the model's template, or a client's text.

`prompt.py` turns it into tokens. Slow for long conversations, so it runs in a worker thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tgi_asgi.api.answer_form import tool_format
from tgi_asgi.api.job import Conversation, Text
from tgi_asgi.api.prompt_images import Images
from tgi_asgi.errors import InvalidRequest, TemplateError
from tgi_asgi.settings import Settings
from tgi_asgi.text.chat.message import ChatMessage
from tgi_asgi.text.images import expand_placeholders, join_fences, spell_out_images
from tgi_asgi.text.tools import (
    add_tool_prompt,
    spell_out,
    with_calls_in_text,
    with_fitting_ids,
    with_listed_tools,
    with_own_tools,
    with_results_in_order,
    with_single_calls,
)

if TYPE_CHECKING:
    from tgi_asgi.api.served import Served
    from tgi_asgi.text.chat.template import ChatTemplate

_NO_TEMPLATE = (
    "The model has no chat template: use /v1/completions, or start the server with --chat-template "
    "and a .jinja file, or a JSON file that has a chat_template"
)


@dataclass(frozen=True, slots=True)
class ChatText:
    """A rendered conversation.

    Attributes:
        shown: The text without marks.
        source: The text to encode; equals `shown` unless `is_marked`.
        is_marked: Whether the messages contain special tokens as text; the ones that act as such are then
            marked in `source`.
        adds_special_tokens: Whether the tokenizer adds its own.
    """

    shown: str
    source: str
    is_marked: bool = False
    adds_special_tokens: bool = False


def chat_text(chat: Conversation, served: Served, settings: Settings) -> ChatText:
    """Render a conversation, with the model's text for its loaded images.

    Raises:
        InvalidRequest: if there are no messages, they are nested too deeply, or images have no place.
        TemplateError: if there is no template, or it refuses the messages.
    """
    try:
        text = _with_expanded_images(_render(chat, served, settings), chat.images, served)
        return replace(text, adds_special_tokens=_adds_special_tokens(chat, text.shown, served))
    except TemplateError as error:
        if error.param is None:
            error.field = ("prompt",)
        raise
    except RecursionError:  # a depth that the decoder barely accepts may be too deep to copy
        raise InvalidRequest("The request body is nested too deeply") from None


def _render(chat: Conversation, served: Served, settings: Settings) -> ChatText:
    template = served.chat_template
    if template is None:
        raise TemplateError(_NO_TEMPLATE)
    if not chat.messages:
        raise InvalidRequest("`{field}` must have at least one message", field=("prompt",))
    messages = _fitted(chat, template, settings)
    # Template variables that come from the administrator or the client.
    given = {**settings.template_variables, "tools": chat.tools, **chat.variables}
    guard = served.tokenizer.guard
    is_marked = not settings.chat_special_tokens and guard.is_needed(messages, given)
    if is_marked:
        messages, given = guard.protect(messages), guard.protect(given)
    # The marks of these images and calls are the model's own, and no text of the client.
    messages = _with_spelled_images(messages, chat.images, template, served)
    messages = with_calls_in_text(messages, tool_format(template, settings)[0], template.shows_calls)
    text = template.render(
        messages,
        add_generation_prompt=chat.adds_turn and not chat.is_continued,
        continue_final_message=chat.is_continued,
        **given,
    )
    return ChatText(*guard.marks(text), is_marked=True) if is_marked else ChatText(text, text)


def _with_spelled_images(
    messages: list[ChatMessage], images: Images | None, template: ChatTemplate, served: Served
) -> list[ChatMessage]:
    """Return messages in which images have a text, if the template of a GGUF file writes none for them."""
    processor = served.image_processor
    if not images or processor is None or not processor.chat_text:
        return messages
    if template.shows_images(processor.placeholder):
        return messages
    return spell_out_images(messages, processor.chat_text, part_roles=template.part_roles)


def _fitted(chat: Conversation, template: ChatTemplate, settings: Settings) -> list[ChatMessage]:
    """Return a conversation's messages in a form that the template accepts and writes without omissions."""
    messages = with_results_in_order([_shown(message, template, settings) for message in chat.messages])
    messages = template.arranged(messages)
    tools = chat.tools if chat.offers_tools else None
    if not (template.mentions("tools") or template.mentions("tool_calls")):
        messages = spell_out(messages, tools, accepts_system=template.accepts_system)
    elif tools and not template.shows_tools:
        messages = with_listed_tools(messages, tools, accepts_system=template.accepts_system)
    if not template.takes_several_calls:
        messages = with_single_calls(messages)
    source = template.tool_source if chat.tools else template.source
    messages = with_own_tools(with_fitting_ids(messages, source), tools, source)
    if tools and chat.tool_prompt and not chat.is_continued:
        messages = add_tool_prompt(messages, chat.tool_prompt)
    return template.with_arguments(template.in_parts(messages))  # JSON may escape special tokens


def _shown(message: ChatMessage, template: ChatTemplate, settings: Settings) -> ChatMessage:
    """Return a message with a role that the template shows, and its content as the template takes it."""
    role = message["role"]
    if role == "developer" and not template.accepts_developer:
        role = "system"
    return {**message, "role": role, "content": _content(message, _separator(template, role, settings))}


def _adds_special_tokens(chat: Conversation, text: str, served: Served) -> bool:
    """Return whether a chat's text gets the tokenizer's special tokens.

    Those of text models never do. `transformers`' processors add them unless the template has written BOS:
    LLaVA 1.5's template leaves it to them.
    """
    if chat.adds_special_tokens is not None:
        return chat.adds_special_tokens
    processor, bos = served.image_processor, served.tokenizer.special_tokens.get("bos_token")
    return processor is not None and processor.adds_special_tokens and not (bos and text.startswith(bos))


def _with_expanded_images(text: ChatText, images: Images | None, served: Served) -> ChatText:
    """Return a prompt with its images' placeholders replaced by the model's text for each."""
    if not images:
        return text
    assert served.image_processor is not None, "a model without image processor gets no images"
    guard, placeholder = served.tokenizer.guard, served.image_processor.placeholder
    texts, fence = [image.text for _, image in images.loaded], images.loaded[0][1].fence
    if not text.is_marked:
        source = join_fences(expand_placeholders(text.source, placeholder, texts), fence)
        return ChatText(source, source)
    source = expand_placeholders(text.source, guard.mark + placeholder, list(map(guard.marked, texts)))
    source = join_fences(source, fence, guard.mark)
    return ChatText(source.replace(guard.mark, ""), source, is_marked=True)


def plain_text(prompt: Text, served: Served) -> str:
    """Return the text of a prompt that is not a chat, with the model's text for its loaded images."""
    text = prompt.content
    assert isinstance(text, str), "ids have no images"
    return _with_expanded_images(ChatText(text, text), prompt.images, served).source


def echoed_text(chat: Conversation, template: ChatTemplate, settings: Settings) -> str:
    """Return the text that a conversation's answer starts with: the continued message, if it is echoed."""
    if not (chat.echoes and chat.is_continued):
        return ""
    content = _content(chat.messages[-1], _separator(template, "assistant", settings) or "")
    return content if isinstance(content, str) else ""


def leaves_open(messages: Sequence[ChatMessage]) -> bool:
    """Return whether a conversation ends with an assistant text for the model to continue."""
    last = messages[-1] if messages else {"role": ""}
    return last["role"] == "assistant" and bool(last["content"]) and not last.get("tool_calls")


def thinking_variables(thinks: bool, level: object = None) -> dict[str, Any]:
    """Return the template variables that control thinking and its effort, under the names that models use."""
    effort = {"reasoning_effort": level} if isinstance(level, str) else {}
    return {"enable_thinking": thinks, "thinking": thinks, **effort}


def _separator(template: ChatTemplate, role: str, settings: Settings) -> str | None:
    """Return the separator of the parts of a role's content, or None if the template takes the list."""
    if settings.tgi_compat:
        return ""
    return None if role in template.part_roles else "\n"


def _content(message: ChatMessage, separator: str | None) -> Any:
    content = message["content"]
    if not isinstance(content, list):
        return content
    if len(content) == 1 and isinstance(content[0], str):  # gives the same tokens as the plain string
        return content[0]
    if separator is None or not all(isinstance(part, str) for part in content):  # images have no text
        return [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return separator.join(content)
