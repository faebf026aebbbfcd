"""Turns a job's messages or text into token ids. Slow for long inputs, so it runs in a worker thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tgi_asgi.api.answer_form import tool_format
from tgi_asgi.api.call import Conversation, Images, Job, Text
from tgi_asgi.api.limits import Overflow, check_characters, tgi_too_long
from tgi_asgi.errors import ContextExceeded, InvalidRequest, TemplateError
from tgi_asgi.settings import MIB, Settings
from tgi_asgi.text.images import expand_placeholders, join_fences, locate_images, spell_out_images
from tgi_asgi.text.tools import (
    add_tool_prompt,
    spell_out,
    with_calls_in_text,
    with_fitting_ids,
    with_listed_tools,
    with_own_tools,
    with_single_calls,
)
from tgi_asgi.types import ImageInput

if TYPE_CHECKING:
    from tgi_asgi.api.context import Served
    from tgi_asgi.text.chat.template import ChatTemplate

_TAIL_CHARS = 64
MAX_COUNTED_CHARS = 4 * MIB  # of a text whose tokens are counted, if no longer prompt fits
SLACK_TOKENS = 64  # beyond those kept of a long text, because cutting text shifts token boundaries
_NO_TEMPLATE = (
    "The model has no chat template: use /v1/completions, or start the server with --chat-template "
    "and a .jinja file, or a JSON file that has a chat_template"
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready for the engine.

    Attributes:
        ids: Its tokens.
        echo: Text that precedes the answer's, if the request asks for that.
        text: The prompt as text, for text offsets; None if not needed.
        num_characters: Length of the prompt's text, if it came as text.
        tail: End of a chat's prompt, which may open a reasoning section.
        images: Positions of its images in the tokens.
    """

    ids: list[int]
    echo: str = ""
    text: str | None = None
    num_characters: int = 0
    tail: str = ""
    images: tuple[ImageInput, ...] = ()


def make_prompt(job: Job, served: Served, settings: Settings) -> Prompt:
    """Render and tokenise a job's prompt, and truncate it as the job says.

    Raises:
        InvalidRequest, TemplateError: as in `chat_text`, or if it is too long however it is tokenised.
    """
    info, keep = served.info, job.keep_tokens
    if keep == "fitting":
        keep = max(min(info.max_total_tokens - (job.max_tokens or 1), info.max_input_tokens), 1)
    try:
        if isinstance(job.prompt, Text):
            prompt = _text_prompt(job.prompt, served, keep)
        else:
            prompt = chat_prompt(job.prompt, served, settings, keep)
    except ContextExceeded as error:
        if job.overflow is Overflow.TGI:
            raise tgi_too_long(info, f"at least {error.num_tokens}") from None
        raise
    if keep is not None and len(prompt.ids) > keep:
        prompt = _cut(prompt, len(prompt.ids) - keep, job.prompt)
    if not prompt.ids:
        field = job.prompt.field if isinstance(job.prompt, Text) else ("prompt",)
        raise InvalidRequest("`{field}` must not be empty", field=field)
    check_vocabulary(prompt.ids, served)
    return prompt


def check_vocabulary(ids: Sequence[int], served: Served) -> None:
    """Raise `InvalidRequest` if a text has tokens that the model lacks: a tokenizer may have more.

    Ids sent by clients were checked when their requests were read.
    """
    vocab_size = served.info.vocab_size
    if served.tokenizer.vocab_size <= vocab_size:
        return
    if (unknown := next((token_id for token_id in ids if token_id >= vocab_size), None)) is not None:
        text = served.tokenizer.decode([unknown], skip_special_tokens=False)
        where = f"the prompt has token {unknown} ({text!r})"
        raise InvalidRequest(f"{where}, but the model has only {vocab_size}")


def _cut(prompt: Prompt, size: int, source: Conversation | Text) -> Prompt:
    """Return a prompt without its first tokens. No image is cut off, because later text may refer to it."""
    if prompt.images and prompt.images[0].start < size:
        assert source.images is not None, "located images have a source"
        param = source.images.sources[0].param
        raise InvalidRequest(f"`{param}` is where truncation would cut the prompt off", param=param)
    del prompt.ids[:size]
    moved = (
        ImageInput(each.digest, each.start - size, each.num_tokens, each.payload) for each in prompt.images
    )
    return replace(prompt, images=tuple(moved))


def chat_prompt(
    chat: Conversation,
    served: Served,
    settings: Settings,
    keep: int | None = None,
    *,
    is_bounded: bool = True,
) -> Prompt:
    """Render and tokenise a conversation; raises as `chat_text`.

    Args:
        keep: Number of tokens of the end that matter; a longer text is cut before tokenising.
        is_bounded: Whether it must fit into the context; otherwise, whether it can be counted is checked.
    """
    text = chat_text(chat, served, settings)
    keep, source = None if _has(chat.images) else keep, text.source
    if is_bounded:
        source = _bounded(source, len(text.shown), served, keep)
    else:
        check_countable(text.shown, served)
    ids = served.tokenizer.encode(
        source, add_special_tokens=text.adds_special_tokens, is_marked=text.is_marked
    )
    echo = ""
    if chat.echoes and chat.is_continued:
        assert served.chat_template is not None, "the messages were rendered"
        separator = _separator(served.chat_template, "assistant", settings) or ""
        content = _content(chat.messages[-1], separator)
        echo = content if isinstance(content, str) else ""
    images = _located(ids, chat.images)
    tail = text.shown[-_TAIL_CHARS:]
    return Prompt(ids, echo, num_characters=len(text.shown), tail=tail, images=images)


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
        text = _with_images(_render(chat, served, settings), chat.images, served)
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
    messages = _with_image_texts(messages, chat.images, template, served)
    messages = with_calls_in_text(messages, tool_format(template, settings)[0], template.shows_calls)
    text = template.render(
        messages,
        add_generation_prompt=chat.adds_turn and not chat.is_continued,
        continue_final_message=chat.is_continued,
        **given,
    )
    return ChatText(*guard.marks(text), is_marked=True) if is_marked else ChatText(text, text)


def _with_image_texts(
    messages: list[dict[str, Any]], images: Images | None, template: ChatTemplate, served: Served
) -> list[dict[str, Any]]:
    """Return messages in which images have a text, if the template of a GGUF file writes none for them."""
    processor = served.image_processor
    if not _has(images) or processor is None or not processor.chat_text:
        return messages
    if template.shows_images(processor.placeholder):
        return messages
    return spell_out_images(messages, processor.chat_text, part_roles=template.part_roles)


def _fitted(chat: Conversation, template: ChatTemplate, settings: Settings) -> list[dict[str, Any]]:
    """Return a conversation's messages in a form that the template accepts, and of which it drops nothing."""
    messages = template.arranged([_shown(message, template, settings) for message in chat.messages])
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


def _shown(message: dict[str, Any], template: ChatTemplate, settings: Settings) -> dict[str, Any]:
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


def _has(images: Images | None) -> bool:
    return images is not None and bool(images.sources)


def _with_images(text: ChatText, images: Images | None, served: Served) -> ChatText:
    """Return a prompt with its images' placeholders replaced by the model's text for each."""
    if images is None or not images.sources:
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


def _located(ids: Sequence[int], images: Images | None) -> tuple[ImageInput, ...]:
    return locate_images(ids, images.loaded) if images is not None and images.loaded else ()


def leaves_open(messages: Sequence[Mapping[str, Any]]) -> bool:
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


def _content(message: dict[str, Any], separator: str | None) -> Any:
    content = message["content"]
    if not isinstance(content, list):
        return content
    if len(content) == 1 and isinstance(content[0], str):  # gives the same tokens as the plain string
        return content[0]
    if separator is None or not all(isinstance(part, str) for part in content):  # images have no text
        return [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return separator.join(content)


def prompt_text(prompt: Text, served: Served) -> str:
    """Return the text of a text prompt, with the model's text for its images."""
    text = prompt.content
    assert isinstance(text, str), "ids have no images"
    return _with_images(ChatText(text, text), prompt.images, served).source


def _text_prompt(prompt: Text, served: Served, keep: int | None) -> Prompt:
    given = prompt.content
    if isinstance(given, str):
        given = prompt_text(prompt, served)
        source = _bounded(given, len(given), served, None if _has(prompt.images) else keep)
        ids = served.tokenizer.encode(source, add_special_tokens=prompt.adds_special_tokens)
        if not ids and prompt.may_be_empty:
            ids = _beginning(served)
        text = given
    else:
        ids, text = list(given), ""
        if prompt.needs_text:
            text = served.tokenizer.decode(ids, skip_special_tokens=not prompt.shows_special_tokens)
    shown = text if prompt.needs_text else None
    return Prompt(ids, text if prompt.echoes else "", shown, len(text), images=_located(ids, prompt.images))


def _beginning(served: Served) -> list[int]:
    """Return the token that stands for the beginning of a document, which is EOS for models without BOS."""
    tokenizer = served.tokenizer
    token_id = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return [] if token_id is None else [token_id]


def check_countable(text: str, served: Served) -> None:
    """Refuse a text that would take too much memory if it were tokenised: about 200 bytes a character.

    Raises:
        InvalidRequest: if it is longer than `MAX_COUNTED_CHARS` and than any prompt that fits.
    """
    limit = max(MAX_COUNTED_CHARS, served.info.max_input_tokens * served.tokenizer.longest_token)
    if len(text) > limit:
        raise InvalidRequest(
            f"The tokens of a text with {len(text)} characters are not counted: the limit is {limit}",
            field=("prompt",),
        )


def _bounded(text: str, num_characters: int, served: Served, keep: int | None) -> str:
    """Return the end of a text that can matter; refuse a text that is too long however it is tokenised.

    Tokenising 16 MiB of text would occupy a worker thread for 20 s.
    """
    longest = served.tokenizer.longest_token
    if keep is None:
        check_characters(num_characters, longest, served.info)
        return text
    return text[-(keep + SLACK_TOKENS) * longest :]
