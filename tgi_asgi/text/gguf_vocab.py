"""Rebuild a tokenizer from a GGUF file's metadata, as the model's own tokenizer.json would build it.

Two kinds of vocabulary are known. "gpt2" is byte-level BPE; its merges are in the file, and how text is split
before them is only named there (`tokenizer.ggml.pre`), so this module holds what each name means. "llama" is
sentencepiece BPE; its merges follow from the scores. All else is refused: a wrong split gives wrong tokens in
silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from tgi_asgi.errors import ModelLoadError

_KEY = "tokenizer.ggml."
_MAX_TOKENS = 1 << 21
_MAX_PIECE_CHARS = (
    512  # of a sentencepiece token (its trainer's default is 16): the cuts of one are tried all
)
_SPACE = "\u2581"

# Values of `tokenizer.ggml.token_type`.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # the key's own spelling
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
# A GGUF file names one end token where generation_config.json lists several; these control tokens always end
# a turn or a text.
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_TEXTS = frozenset(
    {
        "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<|endoftext|>",
        "<end_of_turn>", "<|end_of_turn|>", "<|return|>", "<|call|>",
    }
)  # fmt: skip

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_TAIL}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_TAIL}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)


@dataclass(frozen=True, slots=True)
class _Split:
    """How a byte-level vocabulary's text is cut before the merges.

    Each pattern of `patterns` isolates its matches in what the one before left; None stands for GPT-2's own.
    """

    patterns: tuple[str, ...] | None = None
    splits_digits: bool = False  # every digit alone, before anything else
    ignores_merges: bool = False  # a piece that is a token is not merged up from its bytes
    adds_bos: bool = False  # unless the file says otherwise
    normalizes: bool = False  # to NFC


_GPT2 = _Split()
_DIGITS = _Split(splits_digits=True)
_LLAMA3_SPLIT = _Split((_LLAMA3,), ignores_merges=True, adds_bos=True)
_SPLITS = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "exaone4": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "falcon3": _LLAMA3_SPLIT,
    "lfm2": _LLAMA3_SPLIT,
    "dbrx": _Split((_LLAMA3,)),
    "smaug-bpe": _Split((_LLAMA3,)),
    "qwen2": _Split((_QWEN2,), normalizes=True),
    "deepseek-r1-qwen": _Split((_QWEN2,)),
    "tekken": _Split((_TEKKEN,), ignores_merges=True, adds_bos=True),
    "gpt-4o": _Split((_GPT4O,)),
    "llama4": _Split((_GPT4O,)),
    "deepseek-coder": _Split(_DEEPSEEK_CODER),
    "deepseek-v3": _Split(_DEEPSEEK3),
}


@dataclass(frozen=True, slots=True)
class GgufVocab:
    """What the metadata says of the tokenizer."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]  # "bos_token" -> text
    eos_ids: frozenset[int]
    adds_bos: bool  # the BOS token goes before every text
    adds_eos: bool


def build(metadata: Mapping[str, Any]) -> GgufVocab:
    """Build the tokenizer that `metadata` (of a GGUF file) describes.

    Raises:
        ModelLoadError: the vocabulary is absent, contradicts itself, or is of a kind not known here.
    """
    kind = metadata.get(_KEY + "model")
    if kind not in ("gpt2", "llama"):
        raise ModelLoadError(
            f"the GGUF file's tokenizer is of the kind {kind!r}; `gpt2` (byte-level BPE) and `llama` "
            "(sentencepiece) are supported"
        )
    try:
        tokens = _read_tokens(metadata)
        types = _read_array(metadata, "token_type", len(tokens)) or [_NORMAL] * len(tokens)
        if kind == "gpt2":
            backend, adds_bos = _byte_level(metadata, tokens)
        else:
            backend, adds_bos = _sentencepiece(metadata, tokens, types), True
        special_ids = {
            name: token_id
            for name, key in _SPECIAL_IDS.items()
            if (token_id := _token_id(metadata, key, len(tokens))) is not None
        }
        _add_tokens(backend, tokens, types, frozenset(special_ids.values()))
    except ModelLoadError:
        raise
    except Exception as error:  # what `tokenizers` raises is a bare Exception
        raise ModelLoadError(f"the GGUF file's vocabulary is damaged: {error}") from error
    ends = {_token_id(metadata, key, len(tokens)) for key in _END_KEYS}
    ends |= {index for index, kind in enumerate(types) if kind == _CONTROL and tokens[index] in _END_TEXTS}
    return GgufVocab(
        backend,
        {name: tokens[token_id] for name, token_id in special_ids.items()},
        frozenset(index for index in ends if index is not None),
        adds_bos=_flag(metadata, "add_bos_token", adds_bos),
        adds_eos=_flag(metadata, "add_eos_token", False),
    )


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    name = metadata.get(_KEY + "pre")
    split = _SPLITS.get(name) if isinstance(name, str) else None
    if split is None:
        raise ModelLoadError(
            f"the GGUF file's pre-tokenizer is {name!r}, which is not supported; "
            f"known are {', '.join(_SPLITS)}"
        )
    merges = metadata.get(_KEY + "merges")
    if not isinstance(merges, Sequence) or isinstance(merges, str):
        raise ModelLoadError("the GGUF file has no `tokenizer.ggml.merges`")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=split.ignores_merges))
    steps: list[Any] = []
    if split.splits_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    for pattern in split.patterns or ():
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.patterns is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if split.normalizes:
        backend.normalizer = normalizers.NFC()
    return backend, split.adds_bos


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
    scores = _read_array(metadata, "scores", len(tokens))
    if scores is None:
        raise ModelLoadError("the GGUF file has no `tokenizer.ggml.scores`")
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    unknown = _token_id(metadata, "unknown_token_id", len(tokens))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_by_score(tokens, types, scores),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = _flag(metadata, "add_space_prefix", True)
    escape = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), escape]) if has_prefix else escape
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_by_score(
    tokens: list[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """List every way to put a token together from two others, best score of the result first.

    Control and byte tokens take no part: sentencepiece never builds them from text.
    """
    ranks = {token: index for index, token in enumerate(tokens) if types[index] in (_NORMAL, _UNUSED)}
    longest = max(map(len, ranks), default=0)
    if longest > _MAX_PIECE_CHARS:
        raise ModelLoadError(f"the GGUF file's vocabulary has a token of {longest} characters")
    merges = []
    for token, index in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((-scores[index], ranks[left], ranks[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _add_tokens(
    backend: tokenizers.Tokenizer, tokens: list[str], types: Sequence[int], named: frozenset[int]
) -> None:
    """Let control and user-defined tokens be found whole in text, before anything else is done to it."""
    special, plain = [], []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (_CONTROL, _UNKNOWN) or index in named:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _read_tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get(_KEY + "tokens")
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not 0 < len(tokens) <= _MAX_TOKENS:
        raise ModelLoadError("the GGUF file has no usable `tokenizer.ggml.tokens`")
    texts = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    if len(set(texts)) != len(texts):
        raise ModelLoadError("the GGUF file's vocabulary has the same token twice")
    return texts


def _read_array(metadata: Mapping[str, Any], name: str, size: int) -> list[Any] | None:
    values = metadata.get(_KEY + name)
    if values is None:
        return None
    if not hasattr(values, "tolist") or len(values) != size:
        raise ModelLoadError(f"`{_KEY}{name}` must be an array of {size} numbers, one a token")
    result: list[Any] = values.tolist()
    return result


def _token_id(metadata: Mapping[str, Any], key: str, size: int) -> int | None:
    """Return a special token's id; an id outside the vocabulary means that there is none."""
    value = metadata.get(_KEY + key)
    return value if type(value) is int and 0 <= value < size else None


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(_KEY + key)
    return value if isinstance(value, bool) else default
