"""Reasoning sections: the markers of a model's reasoning, and of the answer after it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningStyle:
    """The markers of one family; clients never see them.

    Attributes:
        name: Name for administrators.
        families: Models that write this style, for the documentation.
        start, end: Markers before and after the section.
        label: Text after `start` that is not reasoning.
        closed: End of a prompt that already contains the section, if that is not `end`.
        shows: Texts that a chat template of this style contains, all of them; `end` if none are given.
        markers: Texts for which some tokenizers have a single token; `start` and `end` if none are given.
    """

    name: str
    families: str
    start: str
    end: str
    label: str = ""
    closed: str = ""
    shows: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()

    @property
    def all_markers(self) -> tuple[str, ...]:
        """All texts of the style for which some tokenizers have a single token."""
        return self.markers or (self.start, self.end)

    def is_open(self, prompt: str) -> bool:
        """Return whether a prompt ends inside the section, so that the answer begins in it."""
        text = prompt.rstrip()
        return text.endswith((self.start, self.start + self.label.rstrip()))

    def is_unfinished(self, answer: str) -> bool:
        """Return whether an answer's text so far, which is to be continued, ends inside the section."""
        return answer.lstrip().startswith(self.start) and self.end not in answer

    def is_closed(self, prompt: str) -> bool:
        """Return whether a prompt ends with a whole section, so that the answer has none."""
        return prompt.rstrip().endswith(self.closed or self.end)

    def recognises(self, template: str) -> bool:
        """Return whether a chat template's source shows that its model writes sections in this style."""
        return all(text in template for text in self.shows or (self.end,))


STYLES = (
    ReasoningStyle(
        name="think",
        families="DeepSeek R1 to V4, Qwen 3 and 3.5, QwQ, GLM-4.5 on, MiniMax M2, Nemotron, Granite 3.3, "
        "EXAONE 4, ERNIE 4.5, Hunyuan, Kimi K2 Thinking, OLMo 3, SmolLM3, Step-3.5, LFM2.5, MiMo",
        start="<think>",
        end="</think>",
    ),
    ReasoningStyle(name="mistral", families="Magistral, Ministral 3", start="[THINK]", end="[/THINK]"),
    ReasoningStyle(
        name="granite",
        families="Granite 3.2",
        start="Here is my thought process:",
        end="Here is my response:",
    ),
    ReasoningStyle(name="seed_oss", families="Seed-OSS", start="<seed:think>", end="</seed:think>",
        shows=("seed:think",)),
    ReasoningStyle(
        name="cohere",
        families="Command R7B, Command A",
        start="<|START_THINKING|>",
        end="<|END_THINKING|>",
    ),
    ReasoningStyle(
        name="gemma4",
        families="Gemma 4",
        start="<|channel>",
        end="<channel|>",
        label="thought\n",
    ),
    ReasoningStyle(name="kimi_vl", families="Kimi-VL Thinking", start="◁think▷", end="◁/think▷"),
    ReasoningStyle(name="apertus", families="Apertus", start="<|inner_prefix|>", end="<|inner_suffix|>"),
    ReasoningStyle(
        name="apriel",
        families="Apriel 1.6",
        start="Here are my reasoning steps:",
        end="[BEGIN FINAL RESPONSE]",
    ),
    ReasoningStyle(
        name="solar",
        families="Solar Open",
        start="<|think|>",
        end="<|end|><|begin|>assistant",
        closed="<|think|><|end|><|begin|>assistant",
        shows=("<|think|>", "<|begin|>assistant"),
        markers=("<|think|>", "<|end|>", "<|begin|>"),
    ),
    ReasoningStyle(name="minimax_m3", families="MiniMax M3", start="<mm:think>", end="</mm:think>"),
    ReasoningStyle(
        name="hy_v3",
        families="Hunyuan 3",
        start="<think:opensource>",
        end="</think:opensource>",
        shows=("<think{}>", "opensource"),
    ),
)  # fmt: skip


@lru_cache(4)  # each request asks: searching a template takes up to 0.07 ms
def style_of(template: str, wanted: str | None = None) -> ReasoningStyle | None:
    """Return the style that a chat template's source shows, or the administrator's choice; None: no style."""
    if wanted is not None:
        return next((style for style in STYLES if style.name == wanted), None)
    return next((style for style in STYLES if style.recognises(template)), None)


_TOKEN = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")


@dataclass(frozen=True, slots=True)
class Wrapper:
    """Markers that some models write around the answer after their reasoning; clients do not see them.

    Attributes:
        start: Possible markers before the answer.
        end: Marker after the answer.
        shows: Texts that a chat template with this wrapper contains, all of them.
    """

    start: tuple[str, ...]
    end: str
    shows: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        """All texts of the wrapper for which some tokenizers have a single token."""
        return tuple(part for text in (*self.start, self.end) for part in _TOKEN.findall(text))


WRAPPERS = (
    Wrapper(("<|START_RESPONSE|>",), "<|END_RESPONSE|>", ("<|START_RESPONSE|>",)),  # Command R7B
    Wrapper(("<|START_TEXT|>",), "<|END_TEXT|>", ("<|START_TEXT|>",)),  # Command A
    Wrapper(("<response>",), "</response>", ("<think></think> and write your response between <response>",)),
    Wrapper(("<answer>",), "</answer>", ("</think>", "<answer>")),  # Hunyuan
    Wrapper(("<answer>",), "</answer>", ("</think>", "<|extra_0|>")),
    Wrapper(("<response>",), "</response>", ("</think>", "<response>", "<tool_output>")),  # ERNIE
    Wrapper((), "[END FINAL RESPONSE]", ("[BEGIN FINAL RESPONSE]",)),  # Apriel
    Wrapper(
        ("<|begin|>assistant<|content|>", "<|content|>"), "<|end|>", ("<|begin|>assistant", "<|content|>")
    ),
    Wrapper(("all\n",), "", (">>>all",)),  # Functionary 3.2
)


@lru_cache(4)
def wrapper_of(template: str) -> Wrapper | None:
    """Return the wrapper of answers that a chat template's source shows, or None."""
    return next((each for each in WRAPPERS if all(text in template for text in each.shows)), None)
