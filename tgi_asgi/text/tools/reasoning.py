"""Reasoning sections: how models mark what they think before they answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningStyle:
    """The markers of one family; they show nowhere in what clients get."""

    start: str
    end: str

    def is_open(self, prompt: str) -> bool:
        """Tell whether a prompt ends inside the section, so that the answer begins in it."""
        return prompt.rstrip().endswith(self.start)

    def is_closed(self, prompt: str) -> bool:
        """Tell whether a prompt ends with a whole section, so that the answer has none."""
        return prompt.rstrip().endswith(self.end)


STYLES = (
    ReasoningStyle("<think>", "</think>"),  # DeepSeek R1, Qwen 3, GLM, Granite 3.3
    ReasoningStyle("[THINK]", "[/THINK]"),  # Magistral
    ReasoningStyle("Here is my thought process:", "Here is my response:"),  # Granite 3.2
)


def style_of(template: str) -> ReasoningStyle | None:
    """Return the style that a chat template's source shows, or None."""
    return next((style for style in STYLES if style.end in template), None)
