"""Keep client text from being read as control tokens: `<|im_end|>` in a message is ten characters.

    guard = tokenizer.guard
    if guard.is_needed(messages):
        text, marked = guard.marks(template.render(guard.protect(messages)))
        ids = tokenizer.encode(marked, add_special_tokens=False, is_marked=True)

Before the template runs, a separator that no client can write is inserted into the texts of special tokens in
the messages. Special tokens that are whole in the template's output are then the template's own and are
marked. Knows no tokenizer and no HTTP.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_SLICE = 1 << 16  # characters per search that holds the GIL
_PRIVATE = 0x100000  # private-use plane, in which no character will ever be assigned
_COMPARED = frozenset({"role", "type"})  # keys whose values templates compare, if they are words
_WORD = re.compile(r"[\w-]*")


def _nonce() -> str:
    """Return a text of four characters that no client can guess."""
    return "".join(chr(_PRIVATE + secrets.randbelow(0xFFFE)) for _ in range(4))


class PromptGuard:
    """A filter that tells a template's own special tokens from those in the text that it was given.

    Args:
        special_texts: Texts of the tokens to guard against.

    Attributes:
        mark: The text that `marks` puts before each special token that acts as one.
    """

    def __init__(self, special_texts: Iterable[str]) -> None:
        texts = sorted({text for text in special_texts if text})
        self.mark = _nonce()
        self._inert = _nonce()  # before a special token that is plain text
        self._break = _nonce()  # inside such a token, and where joining texts might form one
        self._firsts = {text[0] for text in texts}
        self._whole = re.compile(_any_of(texts))
        self._open = re.compile(f"(?<!{self._inert})(?:{self._whole.pattern})")
        self._heads = {text[:size] for text in texts for size in range(1, len(text))}
        self._tails = {text[size:] for text in texts for size in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)

    def is_needed(self, *values: Any) -> bool:
        """Return whether a value's strings contain special tokens, or would if some were joined."""
        keys: list[str] = []
        text = "".join(text for value in values for text in _strings(value, keys))
        text = "\0".join((text, *keys))
        if not any(first in text for first in self._firsts):
            return False
        starts = range(0, len(text), _SLICE)
        return any(self._whole.search(text, start, start + _SLICE + self._longest) for start in starts)

    def protect(self, value: Any) -> Any:
        """Return a copy of a value (plain dicts, lists, strings) in which every special token is broken."""
        if isinstance(value, str):
            return self._protect_text(value)
        if isinstance(value, list):
            return [self.protect(item) for item in value]
        if isinstance(value, dict):
            return {
                self.protect(key): item if _is_compared(key, item) else self.protect(item)
                for key, item in value.items()
            }
        return value

    def marked(self, text: str) -> str:
        """Return a trusted text with the mark before each special token, so that all of them act as such."""
        return self._whole.sub(lambda match: self.mark + match[0], text)

    def marks(self, rendered: str) -> tuple[str, str]:
        """Return a rendered prompt as plain text, and with the mark before each token that acts as such."""
        marked = self._replaced(lambda found: self.mark + found, rendered)
        marked = marked.replace(self._inert, "").replace(self._break, "")
        return marked.replace(self.mark, ""), marked

    def _replaced(self, replace: Callable[[str], str], text: str) -> str:
        """Return a text with its unbroken special tokens replaced, found in searches of one slice each."""
        parts: list[str] = []
        end = 0
        for start in range(0, len(text), _SLICE):
            stop = start + _SLICE
            for match in self._open.finditer(text, max(start, end), stop + self._longest):
                if match.start() >= stop:
                    break
                parts += text[end : match.start()], replace(match[0])
                end = match.end()
        return "".join((*parts, text[end:]))

    def _protect_text(self, text: str) -> str:
        before = ""
        while text != before:  # breaking one may expose another that overlaps it
            before = text
            text = self._replaced(lambda found: f"{self._inert}{found[0]}{self._break}{found[1:]}", text)
        sizes = range(1, min(self._longest, len(text) + 1))
        if any(text[-size:] in self._heads for size in sizes):
            text += self._break
        if any(text[:size] in self._tails for size in sizes):
            text = self._break + text
        return text


def _any_of(texts: list[str], at: int = 0) -> str:
    """Return a pattern of the longest of these texts, sorted and equal before `at`.

    What they begin with alike is searched for once: a model may have hundreds of reserved tokens, and a plain
    alternative of them takes a microsecond at each `<|` of a text.
    """
    has_end = bool(texts) and len(texts[0]) == at
    branches: list[str] = []
    for _, group in itertools.groupby(texts[has_end:], key=lambda text: text[at]):
        alike = list(group)
        pairs = enumerate(zip(alike[0], alike[-1], strict=False))  # as they are sorted, these differ first
        stop = next((place for place, (one, other) in pairs if one != other), len(alike[0]))
        branches.append(re.escape(alike[0][at:stop]) + (_any_of(alike, stop) if len(alike) > 1 else ""))
    if not branches:
        return "" if has_end else r"(?!)"
    return f"(?:{'|'.join(branches)})" + ("?" if has_end else "")


def _is_compared(key: str, value: Any) -> bool:
    """Return whether a template may compare a value with its own words; such a value has no special token.

    Schemas and arguments of tools may have any value under these keys; so may a role with `--tgi-compat`.
    """
    return key in _COMPARED and isinstance(value, str) and _WORD.fullmatch(value) is not None


def _strings(value: Any, keys: list[str]) -> Iterator[str]:
    """Yield a value's strings in an order in which a template might join them, and collect its keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, keys)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not _is_compared(key, item):
                keys.append(key)
                yield from _strings(item, keys)
