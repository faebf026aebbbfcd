"""Build tokenizers for sentencepiece vocabularies, from a GGUF file or a tokenizer.model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from tgi_asgi.errors import ModelLoadError

# Token types, by the numbers that both file formats use.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_TOKENS = 1 << 21
# Of a token (the trainer's default is 16); all ways to cut one are tried.
_MAX_PIECE_CHARS = 512
_SPACE = "\u2581"


def bpe(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], unknown: int | None
) -> tokenizers.Tokenizer:
    """Return a tokenizer that merges a text as a whole, without any normalisation before."""
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
    backend: tokenizers.Tokenizer,
    *,
    has_prefix: bool,
    prefixes_parts: bool = True,
    is_squeezed: bool = False,
    charsmap: bytes = b"",
) -> None:
    """Set how text is converted to the vocabulary's characters, and back.

    Args:
        has_prefix: Whether a space goes before a text.
        prefixes_parts: Whether one also goes before what follows a special token inside the text.
        is_squeezed: Whether runs of spaces become one, and spaces at the ends are removed.
        charsmap: sentencepiece's compiled normalisation rules.

    Raises:
        ModelLoadError: if these are damaged.
    """
    if charsmap and not _is_charsmap(charsmap):
        raise ModelLoadError("the vocabulary's compiled normalisation rules (charsmap) are damaged")
    before: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if is_squeezed:
        before += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if has_prefix and not prefixes_parts:  # a normaliser does not know where its text is
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    else:
        before += [normalizers.Prepend(_SPACE)] if has_prefix else []
        before.append(normalizers.Replace(" ", _SPACE))
    if before:
        backend.normalizer = normalizers.Sequence(before) if len(before) > 1 else before[0]
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)


def _is_charsmap(data: bytes) -> bool:
    """Return whether no text leads out of the compiled rules: `tokenizers` would panic.

    They are a size, a trie in units of 32 bits (a double array, as darts-clone writes it), and strings that
    its leaves point to. A unit's children are at its own index ^ offset ^ a byte.
    """
    size = int.from_bytes(data[:4], "little")
    if size % 4 or not 4 <= size < len(data) - 4:
        return False
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    strings = np.frombuffer(data, np.uint8, offset=4 + size)
    is_leaf = units >> 31 == 1
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    inner = (np.arange(len(units)) ^ offsets)[~is_leaf]
    if ((inner | 255) >= len(units)).any():
        return False
    leaves = (units & ((1 << 31) - 1))[is_leaf]
    in_strings = bool((leaves < len(strings)).all()) and strings[-1] == 0
    return in_strings and bool((strings[leaves] & 0xC0 != 0x80).all())  # none begins within a character


def merges_by_score(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """List every way to build a token from two others, best score of the result first.

    Control and byte tokens are excluded, because sentencepiece never builds them from text.

    Raises:
        ModelLoadError: if a token is so long that this would take minutes.
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
    backend: tokenizers.Tokenizer,
    tokens: Sequence[str],
    types: Sequence[int],
    named: Collection[int],
    *,
    keeping: Collection[str] | None = None,
) -> None:
    """Make control and user-defined tokens match as a whole in text, before any other processing.

    Args:
        named: Ids of further tokens that are special.
        keeping: Tokens that leave white space after them in the text, if others take it; None: all leave it.
    """
    special, plain = [], []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        is_taking = keeping is not None and token not in keeping
        if kind in (CONTROL, UNKNOWN) or index in named:
            special.append(AddedToken(token, rstrip=is_taking, normalized=False, special=True))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, rstrip=is_taking, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
