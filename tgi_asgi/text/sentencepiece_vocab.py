"""Tokenizers of sentencepiece's vocabularies, from what a GGUF file or a tokenizer.model says of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from tgi_asgi.errors import ModelLoadError

# What a token is, by the number that both files have for it.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_TOKENS = 1 << 21
# Of a token (the trainer's default is 16): the cuts of one are tried all.
_MAX_PIECE_CHARS = 512
_SPACE = "\u2581"


def bpe(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], unknown: int | None
) -> tokenizers.Tokenizer:
    """Return a tokenizer that merges a text whole, without what is done to the text before."""
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    return tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=list(merges),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )


def set_spaces(
    backend: tokenizers.Tokenizer, *, has_prefix: bool, is_squeezed: bool = False, charsmap: bytes = b""
) -> None:
    """Say how text becomes what the vocabulary is made of, and back.

    Args:
        has_prefix: a space goes before a text.
        is_squeezed: of several spaces one is left, and none at the ends.
        charsmap: sentencepiece's compiled rules of normalisation.
    """
    before: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if is_squeezed:
        before += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    before += [normalizers.Prepend(_SPACE)] if has_prefix else []
    before.append(normalizers.Replace(" ", _SPACE))
    backend.normalizer = normalizers.Sequence(before) if len(before) > 1 else before[0]
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)


def merges_by_score(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """List every way to put a token together from two others, best score of the result first.

    Control and byte tokens take no part: sentencepiece never builds them from text.

    Raises:
        ModelLoadError: a token is so long that this would take minutes.
    """
    ranks = {token: index for index, token in enumerate(tokens) if types[index] in (NORMAL, UNUSED)}
    longest = max(map(len, ranks), default=0)
    if longest > _MAX_PIECE_CHARS:
        raise ModelLoadError(f"the vocabulary has a token of {longest} characters")
    merges = []
    for token, index in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((-scores[index], ranks[left], ranks[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def add_tokens(
    backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int], named: Collection[int]
) -> None:
    """Let control and user-defined tokens be found whole in text, before anything else is done to it.

    Args:
        named: ids of further tokens that are special.
    """
    special, plain = [], []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (CONTROL, UNKNOWN) or index in named:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
