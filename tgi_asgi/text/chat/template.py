"""Chat templates: messages to prompt text in jinja2's immutable sandbox, by the rules of transformers.

The source comes from the model or the administrator, never from a request; its variables do come from
requests. `render` takes up to milliseconds and belongs in a worker thread. Knows no tokenizer and no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes

from tgi_asgi.errors import ModelLoadError, TemplateError
from tgi_asgi.formats.files import read_json
from tgi_asgi.text.chat.message import ChatMessage, ChatTool
from tgi_asgi.text.chat.probes import CALL, RESULT, USER, Probes
from tgi_asgi.text.chat.sandbox import MAX_CHARS, make_environment
from tgi_asgi.text.chat.system import (
    accepts_scattered,
    is_scattered,
    merge_system_messages,
    move_instructions,
)
from tgi_asgi.text.chat.time_limit import limited_time
from tgi_asgi.text.chat.turns import Turns

_SENTINEL = "CONTINUE_FINAL_MESSAGE_TAG "  # the space shows whether the template trims content
# Errors that a template can raise: jinja's own, and those of Python operations on values of the wrong type.
_RENDER_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError,
    RecursionError, TypeError, ValueError,
)  # fmt: skip


class ChatTemplate:
    """One model's chat template, compiled.

    Args:
        source: Source of the template.
        special_tokens: `bos_token`, `eos_token`, ...: variables of the template.
        tool_use_source: Source of a second template, for requests with tools.

    Attributes:
        part_roles: Roles whose content may stay a list of parts; for others the caller joins the texts.
        accepts_developer: Whether a message of the role `developer` is shown; otherwise the caller makes it a
            system one.
        accepts_scattered_system: Whether system messages may come anywhere; otherwise `render` joins them
            into one at the front.
        accepts_system: Whether a system message is shown, not refused or dropped; otherwise `render` moves
            its text into the user's first message.
        shows_tools: Whether the tools are shown, given as the variable `tools` or in the system message.
        takes_several_calls: Whether an answer may have several calls; otherwise it is refused, or only the
            first is shown.

    Raises:
        TemplateError: if the source does not compile.
    """

    def __init__(
        self, source: str, special_tokens: dict[str, str], *, tool_use_source: str | None = None
    ) -> None:
        self.source = source
        self._tool_use_source = tool_use_source
        self._special_tokens = dict(special_tokens)
        self._words: set[str] = set()
        self._shows_images: dict[str, bool] = {}  # by placeholder
        self._default = self._compile(source)
        self._tool_use = self._compile(tool_use_source) if tool_use_source is not None else self._default
        probes = Probes(self._probe)
        self._form = probes.form
        roles = ("system", "developer", "user", "assistant", "tool")
        self.part_roles = frozenset(role for role in roles if probes.shows_parts(role))
        user, developer = ({"role": role, "content": "PROBE"} for role in ("user", "developer"))
        self._drops_texts = "user" in self.part_roles and not probes.shows(user)
        self.accepts_developer = self.mentions("developer") and probes.shows(developer, USER)
        self.accepts_scattered_system = accepts_scattered(self._probe, has_developer=self.accepts_developer)
        self._turns = Turns(probes)
        system, question = {"role": "system", "content": "PROBE-0"}, {"role": "user", "content": "PROBE-1"}
        self.accepts_system = not probes.loses(system, USER, unlike=(question,))
        self._accepts_lone_system = not probes.loses(system, unlike=(question,))
        results = (question, CALL, RESULT)
        self._hides_system = probes.loses(system, *results, unlike=results)
        self.shows_tools = probes.shows_tools()
        self._drops_calls = {has_text: probes.drops_call(has_text=has_text) for has_text in (False, True)}
        self.takes_several_calls = probes.takes_several_calls()

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling to another process, which compiles the template again."""
        return _restored, (self.source, self._special_tokens, self._tool_use_source)

    @property
    def tool_source(self) -> str:
        """Source of the template for requests with tools."""
        return self._tool_use_source or self.source

    def mentions(self, name: str) -> bool:
        """Return whether the template reads a variable, attribute or key of that name."""
        return name in self._words

    def shows_calls(self, message: Mapping[str, Any]) -> bool:
        """Return whether a message's calls are shown: some templates drop all, some those beside text."""
        return not self._drops_calls[bool(message.get("content"))]

    def shows_images(self, placeholder: str) -> bool:
        """Return whether the template writes this text for an image."""
        if placeholder not in self._shows_images:
            parts = [{"type": "image"}, {"type": "text", "text": "PROBE"}]
            text = self._probe([{"role": "user", "content": parts}])
            self._shows_images[placeholder] = placeholder in text
        return self._shows_images[placeholder]

    def arranged(self, messages: list[ChatMessage]) -> list[ChatMessage]:
        """Return messages in an order that the template accepts; several of one role may become one."""
        if not self.accepts_scattered_system and is_scattered(messages):
            messages = merge_system_messages(messages)
        if messages and messages[0]["role"] == "system":
            if not (self.accepts_system if len(messages) > 1 else self._accepts_lone_system):
                messages = move_instructions(messages)
            elif self._hides_system and messages[-1]["role"] not in ("system", "user"):
                messages = move_instructions(messages, is_last=True)
        return self._turns.arranged(messages)

    def with_arguments(self, messages: list[ChatMessage]) -> list[ChatMessage]:
        """Return messages with the arguments of calls as the template takes them; see `render`."""
        return self._form.with_arguments(messages)

    def in_parts(self, messages: list[ChatMessage]) -> list[ChatMessage]:
        """Return messages with texts as parts, if the template shows no plain texts (SmolVLM's)."""
        if not self._drops_texts:
            return messages
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in messages
        ]

    def render(
        self,
        messages: list[ChatMessage],
        /,
        *,
        tools: list[ChatTool] | None = None,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Return the prompt of a conversation of plain dicts, lists and strings, which is not changed.

        Tool-call arguments given as a string with a JSON object reach the template as the object, or as text
        if the template concatenates them with text (DeepSeek's). Arguments that are not an object, such as
        those of a call that was cut off, become an empty one, so that the conversation can go on. A call's
        text joins its reasoning if the template refuses both (gpt-oss's). With `continue_final_message` the
        prompt ends right after the last message's content. If the template would refuse or drop system
        messages that are not a single one at the front, they are joined into one there, or join a message of
        the user; turns that it would refuse or drop are arranged as in `Turns.arranged`.

        Raises:
            TemplateError: if the template refused the messages, failed on them, or wrote too much.
        """
        messages = self.arranged(messages)
        chat = [self._form.prepared(message) for message in self.with_arguments(messages)]
        if continue_final_message:
            if add_generation_prompt:
                raise TemplateError("continue_final_message and add_generation_prompt exclude each other")
            _mark_end(chat)
        template = self._tool_use if tools else self._default
        text = _render(
            template,
            {
                **self._special_tokens,
                **variables,
                "messages": chat,
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return _cut_at_end(text, messages[-1]) if continue_final_message else text

    def _compile(self, source: str) -> jinja2.Template:
        try:
            environment = make_environment()
            tree = environment.parse(source)
            self._words.update(_words(tree))
            return environment.from_string(tree)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"The chat template does not compile: {error}") from error

    def _probe(self, messages: Sequence[ChatMessage], tools: list[ChatTool] | None = None) -> str:
        variables = {**self._special_tokens, "messages": list(messages), "tools": tools, "documents": None}
        try:
            return _render(self._tool_use if tools else self._default, variables)
        except TemplateError:
            return ""


def _restored(source: str, special_tokens: dict[str, str], tool_use_source: str | None) -> ChatTemplate:
    return ChatTemplate(source, special_tokens, tool_use_source=tool_use_source)


def load_chat_template(
    special_tokens: dict[str, str],
    *,
    override: Path | None = None,
    directory: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ChatTemplate | None:
    """Find the model's chat template and compile it; return None if there is none.

    The first of these that exists is used: the administrator's `override` (a tokenizer_config.json, or a bare
    .jinja file), `chat_template.jinja` in `directory`, `additional_chat_templates/` there, `chat_template` of
    its processor_config.json or chat_template.json (of older vision models) or tokenizer_config.json,
    `tokenizer.chat_template` of a GGUF file's `metadata`.

    Raises:
        ModelLoadError: if a file cannot be read, or the override holds no template.
        TemplateError: if the template does not compile.
    """
    named = _find_sources(override, directory, metadata or {})
    if not named:
        return None
    default = named.get("default") or next(iter(named.values()))
    return ChatTemplate(default, special_tokens, tool_use_source=named.get("tool_use"))


def _find_sources(
    override: Path | None, directory: Path | None, metadata: Mapping[str, Any]
) -> dict[str, str]:
    if override is not None:
        named = {"default": _read(override)} if override.suffix == ".jinja" else _from_config(override)
        if not named:
            raise ModelLoadError(f"{override} has no chat_template")
        return named
    if directory is not None:
        named = {
            path.stem: _read(path) for path in sorted(directory.glob("additional_chat_templates/*.jinja"))
        }
        if (single := directory / "chat_template.jinja").is_file():
            named["default"] = _read(single)
        for name in ("processor_config.json", "chat_template.json", "tokenizer_config.json"):
            if "default" not in named and (config := directory / name).is_file():
                named = {**_from_config(config), **named}
        if named:
            return named
    prefix = "tokenizer.chat_template"
    return {
        "default" if key == prefix else key[len(prefix) + 1 :]: value
        for key, value in sorted(metadata.items())
        if (key == prefix or key.startswith(prefix + ".")) and isinstance(value, str) and value
    }


def _from_config(path: Path) -> dict[str, str]:
    template = read_json(path).get("chat_template")
    try:
        if isinstance(template, list):
            return {str(entry["name"]): str(entry["template"]) for entry in template}
        if isinstance(template, dict):
            return {str(name): str(text) for name, text in template.items()}
    except (LookupError, TypeError) as error:
        raise ModelLoadError(f"{path}: the list in `chat_template` is damaged: {error!r}") from error
    return {"default": template} if isinstance(template, str) and template else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"Cannot read the chat template {path}: {error}") from error


def _render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    pieces: list[str] = []
    size = 0
    try:
        with limited_time():
            for piece in template.generate(variables):
                size += len(piece)
                if size > MAX_CHARS:
                    raise TemplateError(f"The chat template wrote more than {MAX_CHARS} characters")
                pieces.append(piece)
    except _RENDER_ERRORS as error:
        raise TemplateError(str(error) or type(error).__name__) from error
    return "".join(pieces)


def _mark_end(chat: list[ChatMessage]) -> None:
    """Append the sentinel to the last message's content, in place."""
    if not chat or not chat[-1]["content"]:
        raise TemplateError("continue_final_message needs a final message with content")
    content = chat[-1]["content"]
    if isinstance(content, str):
        chat[-1]["content"] = content + _SENTINEL
        return
    parts = [dict(part) for part in content]
    last = next((part for part in reversed(parts) if isinstance(part.get("text"), str)), None)
    if last is None:
        raise TemplateError("continue_final_message needs a final message with text")
    last["text"] += _SENTINEL
    chat[-1]["content"] = parts


def _cut_at_end(text: str, final: ChatMessage) -> str:
    content = final["content"]
    if not isinstance(content, str):
        content = next(part["text"] for part in reversed(content) if isinstance(part.get("text"), str))
    at = text.rfind(_SENTINEL.strip())
    if at < 0 or content.strip() not in text:
        raise TemplateError("continue_final_message: the chat template drops or changes the final message")
    # If the template trims content, it removed the sentinel's space; then the content's trailing space goes,
    # too.
    return text[:at] if text.startswith(_SENTINEL, at) else text[:at].rstrip()


def _words(tree: jinja2.nodes.Template) -> Iterator[str]:
    kinds: Any = (jinja2.nodes.Name, jinja2.nodes.Getattr, jinja2.nodes.Const)
    for node in tree.find_all(kinds):
        match node:
            case (
                jinja2.nodes.Name(name=word)
                | jinja2.nodes.Getattr(attr=word)
                | jinja2.nodes.Const(value=str(word))
            ):
                yield word
