"""Text between two others ("fill in the middle"): how models of code mark what comes before and after it.

    fill_of(tokenizer).marks.prompt("a = ", "# end")  # "<|fim_prefix|>a = <|fim_suffix|># end<|fim_middle|>"

Called by `api` for a `suffix`; knows no wire format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Encoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def token_text(self, token_id: int, /) -> str: ...


@dataclass(frozen=True, slots=True)
class FillMarks:
    """One family's way to write such a prompt.

    Attributes:
        before: Text before the prefix.
        after: Text before the suffix.
        middle: Text at the end of the prompt, which the model continues; "" if there is none.
        is_suffix_first: Whether the suffix comes before the prefix.
    """

    before: str
    after: str
    middle: str
    is_suffix_first: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """The marks, each of which is a token of the vocabulary."""
        return tuple(filter(None, (self.before, self.after, self.middle)))

    def prompt(self, prefix: str, suffix: str) -> str:
        """Return the text that asks for what goes between two texts."""
        parts = [self.before + prefix, self.after + suffix]
        return "".join((*(reversed(parts) if self.is_suffix_first else parts), self.middle))


# Qwen and CodeGemma; StarCoder, Granite; SantaCoder; DeepSeek; GLM; Seed-Coder; Codestral.
_FAMILIES = (
    FillMarks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    FillMarks("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    FillMarks("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    FillMarks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001 - its own bars
    FillMarks("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    FillMarks("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", is_suffix_first=True),
    FillMarks("[PREFIX]", "[SUFFIX]", "", is_suffix_first=True),
)
# Tokens after which these models would begin another file, or have nothing to say.
_ENDS = (
    "<|fim_pad|>", "<fim_pad>", "<fim-pad>", "<|file_sep|>", "<file_sep>", "<|file_separator|>",
    "<|repo_name|>", "<repo_name>", "<reponame>", "<|endoftext|>",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fill:
    """The marks of one vocabulary, and the tokens that end what is filled in."""

    marks: FillMarks
    end_ids: frozenset[int]


def fill_of(tokenizer: Encoder) -> Fill | None:
    """Return how the model of a tokenizer fills in; None if its vocabulary has no such marks."""

    def ids(texts: Sequence[str]) -> list[int]:
        found = ((text, tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        # A single token may also be the one for unknown words.
        return [each[0] for text, each in found if [*map(tokenizer.token_text, each)] == [text]]

    for marks in _FAMILIES:
        own = ids(marks.texts)
        if len(own) == len(marks.texts):
            return Fill(marks, frozenset((*own, *ids(_ENDS))))
    return None
