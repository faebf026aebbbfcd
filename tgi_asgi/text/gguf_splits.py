"""How text is split before the merges of a byte-pair vocabulary, by the names used in GGUF files.

The names are llama.cpp's (`tokenizer.ggml.pre`). Each split follows the model's own tokenizer.json, or
llama.cpp's behaviour if that is not known. `gguf_vocab` is the only caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from tokenizers import Regex, pre_tokenizers


class Step(Enum):
    """A way to split that is not a pattern."""

    DIGIT = auto()  # every digit separately
    DIGITS = auto()  # runs of digits
    PUNCTUATION = auto()  # runs of punctuation
    GPT2 = auto()  # GPT-2's pattern; later steps see bytes in GPT-2's alphabet, one character each


@dataclass(frozen=True, slots=True)
class Split:
    """How one vocabulary's text is split.

    Each step splits the pieces of the previous one; the matches of a pattern become pieces of their own.
    """

    steps: tuple[str | Step, ...]
    is_byte_level: bool = True  # otherwise pieces are plain text in which "▁" stands for a space
    ignores_merges: bool = False  # whether a piece that is a token is used as is, without merging its bytes
    adds_bos: bool = False  # unless the file specifies it
    normalizes: bool = False  # to NFC

    def pre_tokenizer(self) -> Any:
        """Build the pre-tokenizer; return None if the whole text is one piece."""
        steps = [_BUILT[step]() if isinstance(step, Step) else _isolate(step) for step in self.steps]
        if self.is_byte_level and Step.GPT2 not in self.steps:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps) if steps else None


_BUILT: dict[Step, Callable[[], Any]] = {
    Step.DIGIT: lambda: pre_tokenizers.Digits(individual_digits=True),
    Step.DIGITS: lambda: pre_tokenizers.Digits(individual_digits=False),
    Step.PUNCTUATION: lambda: pre_tokenizers.Punctuation(behavior="contiguous"),
    Step.GPT2: lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}


def _isolate(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_TAIL = rf"{_SYMBOLS}[\r\n]*|\s*[\r\n]+|{_SPACES}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_TAIL = rf"{_SYMBOLS}[\r\n/]*|\s*[\r\n]+|{_SPACES}"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_TAIL}"
_CASED_WORDS = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?"
_GPT4O = rf"{_CASED_WORDS}|\p{{N}}{{1,3}}|{_CASED_TAIL}"
_HAN_UPPER, _HAN_LOWER = (rf"[{letters[1:-1]}&&[^\p{{Han}}]]" for letters in (_UPPER, _LOWER))
_KIMI = (
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_HAN_UPPER}*{_HAN_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_HAN_UPPER}+{_HAN_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_TAIL}"
)
_CHINESE_JAPANESE = r"\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff"
_ASIAN = rf"[{_CHINESE_JAPANESE}]+"
_MARKED_WORDS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_MARKED = rf"{_MARKED_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
_DEEPSEEK3 = (r"\p{N}{1,3}", _ASIAN, _MARKED)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    Step.DIGIT,
)
# The cased letters of the Unicode version with which the model was trained.
_OLD_CASED = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8a\u2d00-\u2d2d\ua790-\ua7fa\uab30-\uab68"
    r"\x{10570}-\x{105bc}\x{10d50}-\x{10d85}\x{16e40}-\x{16e7f}\x{1d400}-\x{1d7cb}\x{1df00}-\x{1df2a}]]"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?{_OLD_CASED}+",
    r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    Step.DIGIT,
)
_BLOOM = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_YOUTU = (
    r"[\uac00-\ud7a3\u3131-\u318e]+"
    r"|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    rf"|[\u3105-\u312f]+|[{_CHINESE_JAPANESE}]+"
)
_JAIS2_SPACES = "|".join(rf"\s{{{size}}}(?!\S)" for size in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
_AFMOE_ASIAN = (
    r"[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e00-\u0e7f"
    r"\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)

_GPT2_SPLIT = Split((Step.GPT2,))
_DIGITS_SPLIT = Split((Step.DIGIT, Step.GPT2))
_LLAMA3_SPLIT = Split((_LLAMA3,), ignores_merges=True, adds_bos=True)
_QWEN2_SPLIT = Split((_QWEN2,))
_GPT4O_SPLIT = Split((_GPT4O,))
_DEEPSEEK3_SPLIT = Split(_DEEPSEEK3)
_BAILING_SPLIT = Split(
    (
        rf"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|{_SPACES}",
    )
)
# The text is not split, so its spaces do not block merges.
SENTENCEPIECE = Split((), is_byte_level=False, adds_bos=True)

SPLITS = {
    "gpt-2": _GPT2_SPLIT,
    "phi-2": _GPT2_SPLIT,
    "exaone4": _GPT2_SPLIT,
    "gigachat": _GPT2_SPLIT,
    "a.x-4.0": _GPT2_SPLIT,
    "mellum": _GPT2_SPLIT,
    "jais": _GPT2_SPLIT,
    "trillion": _GPT2_SPLIT,
    "granite-docling": _GPT2_SPLIT,
    **dict.fromkeys(
        ("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code", "roberta-bpe"),
        _GPT2_SPLIT,
    ),
    "modern-bert": replace(_GPT2_SPLIT, normalizes=True),
    "mpt": replace(_GPT2_SPLIT, normalizes=True),
    "olmo": replace(_GPT2_SPLIT, normalizes=True),
    "smollm": _DIGITS_SPLIT,
    "starcoder": _DIGITS_SPLIT,
    "refact": _DIGITS_SPLIT,
    "codeshell": _DIGITS_SPLIT,
    "exaone": _DIGITS_SPLIT,
    "minerva-7b": _DIGITS_SPLIT,
    "mellum2": _DIGITS_SPLIT,
    "command-r": replace(_DIGITS_SPLIT, normalizes=True),
    "falcon": Split((Step.PUNCTUATION, Step.GPT2, Step.DIGITS, "[0-9][0-9][0-9]")),
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "falcon3": _LLAMA3_SPLIT,
    "falcon-h1": _LLAMA3_SPLIT,
    "pixtral": _LLAMA3_SPLIT,
    "midm-2.0": _LLAMA3_SPLIT,
    "lfm2": _LLAMA3_SPLIT,
    "jina-v5-nano": _LLAMA3_SPLIT,
    "glm4": replace(_LLAMA3_SPLIT, adds_bos=False),
    "glm5": replace(_LLAMA3_SPLIT, adds_bos=False),
    "dbrx": Split((_LLAMA3,)),
    "smaug-bpe": Split((_LLAMA3,)),
    "chatglm-bpe": Split((_LLAMA3,)),
    "minicpm5": Split((r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_TAIL}"), ignores_merges=True),
    "jais-2": Split(
        (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]+|{_JAIS2_SPACES}|\s",)
    ),
    "qwen2": replace(_QWEN2_SPLIT, normalizes=True),
    "qwen35": Split((_QWEN35,), normalizes=True),
    "deepseek-r1-qwen": _QWEN2_SPLIT,
    "stablelm2": _QWEN2_SPLIT,
    "hunyuan": _QWEN2_SPLIT,
    "solar-open": _QWEN2_SPLIT,
    "kormo": _QWEN2_SPLIT,
    "f2llmv2": _QWEN2_SPLIT,
    "megrez": _QWEN2_SPLIT,
    "grok-2": _QWEN2_SPLIT,
    "laguna": Split((r"[^\n]+|\n+", _QWEN2)),
    "ufakzeka": Split((rf"{_WORD}|\p{{N}}|{_TAIL}",)),
    "seed-coder": Split(
        (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|{_SPACES}",)
    ),
    "bailingmoe": _BAILING_SPLIT,
    "bailingmoe2": _BAILING_SPLIT,
    "llada-moe": _BAILING_SPLIT,
    "exaone-moe": Split(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"|{_SYMBOLS}[\r\n/]?|\s*[\r\n]|{_SPACES}",
        )
    ),
    "tekken": Split((_TEKKEN,), ignores_merges=True, adds_bos=True),
    "gpt-4o": _GPT4O_SPLIT,
    "llama4": _GPT4O_SPLIT,
    "kanana2": _GPT4O_SPLIT,
    "talkie": _GPT4O_SPLIT,
    "minimax-m2": _GPT4O_SPLIT,
    "tiny_aya": Split((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    "cohere2moe": Split((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    "youtu": Split((_YOUTU, rf"{_CASED_WORDS}|\p{{N}}|{_CASED_TAIL}"), ignores_merges=True),
    "kimi-k2": Split((_KIMI,)),
    "deepseek-llm": Split(_DEEPSEEK_LLM),
    "deepseek-coder": Split(_DEEPSEEK_CODER),
    "deepseek-v3": _DEEPSEEK3_SPLIT,
    "hunyuan-dense": _DEEPSEEK3_SPLIT,
    "hy_v4": _DEEPSEEK3_SPLIT,
    "joyai-llm": _DEEPSEEK3_SPLIT,
    "spark2_5": Split(
        (r"\p{N}{1,3}", _ASIAN, rf"{_MARKED_WORDS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}", Step.DIGIT)
    ),
    # Digits in groups of three, counted from their end.
    "afmoe": Split((r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _AFMOE_ASIAN, _MARKED)),
    "superbpe": Split((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "bloom": Split((_BLOOM,)),
    "poro-chat": Split((_BLOOM,)),
    "gpt3-finnish": Split((_BLOOM,)),
    "viking": Split((_BLOOM, Step.DIGIT)),
    "sarvam-moe": replace(SENTENCEPIECE, adds_bos=False),
}
