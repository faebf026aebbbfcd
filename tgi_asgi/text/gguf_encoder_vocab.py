"""Build the tokenizers of embedding models from a GGUF file: WordPiece ("bert") and unigram ("t5").

Called by `gguf_vocab`, which reads and bounds the lists of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.text import sentencepiece_vocab
from tgi_asgi.text.sentencepiece_vocab import CONTROL

_SPACE = "\u2581"
_NORMALIZER = "tokenizer.ggml.normalizer."
_MAX_CHARSMAP = 1 << 24  # bytes of compiled rules; XLM-RoBERTa's are 0.3 MB


def restore_word_pieces(tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """Undo how llama.cpp's converter marks words: "▁word" is word, and "ing" is ##ing."""

    def restored(token: str, kind: int) -> str:
        if kind == CONTROL:
            return token
        return token[1:] if token.startswith(_SPACE) and len(token) > 1 else f"##{token}"

    found = [restored(*each) for each in zip(tokens, types, strict=True)]
    if len(set(found)) != len(found):
        raise ModelLoadError("the GGUF file's vocabulary has the same token twice")
    return found


def word_pieces(
    metadata: Mapping[str, Any], tokens: Sequence[str], unknown: str | None
) -> tokenizers.Tokenizer:
    """Return BERT's tokenizer.

    Files say only since 2026 whether it lowers texts. Otherwise, a vocabulary with capital letters does not.
    """
    if unknown is None:
        raise ModelLoadError("the GGUF file names no token for unknown words")
    has_capitals = any(token.isalpha() and token != token.lower() for token in tokens)
    lowers = metadata.get(f"{_NORMALIZER}lowercase", not has_capitals)
    strips = metadata.get(f"{_NORMALIZER}strip_accents", lowers)
    if type(lowers) is not bool or type(strips) is not bool:
        raise ModelLoadError(f"`{_NORMALIZER}lowercase` and `strip_accents` must be true or false")
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(strip_accents=strips, lowercase=lowers)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def unigram(
    metadata: Mapping[str, Any], tokens: Sequence[str], scores: Sequence[float], unknown: int | None
) -> tokenizers.Tokenizer:
    """Return sentencepiece's unigram tokenizer, as T5 and XLM-RoBERTa have it."""
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap", b"")
    if isinstance(charsmap, np.ndarray) and charsmap.dtype.itemsize == 1 and charsmap.size <= _MAX_CHARSMAP:
        charsmap = charsmap.tobytes()
    if not isinstance(charsmap, bytes):
        raise ModelLoadError("`tokenizer.ggml.precompiled_charsmap` must be an array of bytes")
    scored = list(zip(tokens, map(float, scores), strict=True))
    has_bytes = "<0x00>" in tokens
    backend = tokenizers.Tokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=has_bytes))
    sentencepiece_vocab.set_spaces(
        backend,
        has_prefix=metadata.get("tokenizer.ggml.add_space_prefix") is not False,
        is_squeezed=metadata.get("tokenizer.ggml.remove_extra_whitespaces") is True,
        charsmap=charsmap,
    )
    return backend


def surround(
    backend: tokenizers.Tokenizer, first: str | None, last: str | None, separator: str | None
) -> None:
    """Put special tokens around texts and pairs.

    Args:
        separator: What goes before a pair's second text, after `last`: RoBERTa's have it twice.
    """

    def pieces(segment: int, *texts: str | None) -> list[str]:
        return [f"{text}:{segment}" for text in texts if text is not None]

    backend.post_processor = processors.TemplateProcessing(
        single=[*pieces(0, first), "$A:0", *pieces(0, last)],
        pair=[
            *pieces(0, first), "$A:0", *pieces(0, last),
            *pieces(0, separator), "$B:1", *pieces(1, last),
        ],
        special_tokens=[
            (text, backend.token_to_id(text))
            for text in dict.fromkeys((first, last, separator))
            if text is not None
        ],
    )  # fmt: skip
