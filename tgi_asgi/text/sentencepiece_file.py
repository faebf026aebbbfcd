"""Read sentencepiece's tokenizer.model, for checkpoints that have no tokenizer.json.

The file is protobuf with a few messages; it is untrusted and parsed here field by field. Layout:
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import models

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import read_file
from tgi_asgi.text import sentencepiece_vocab
from tgi_asgi.text.sentencepiece_vocab import MAX_TOKENS, NORMAL, add_tokens, merges_by_score

_MAX_BYTES = 100_000_000  # the largest in use have about 5 MB
_UNIGRAM, _BPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(slots=True)
class SentencepieceModel:
    """The contents of a file; defaults are the format's.

    Attributes:
        prefixes_parts: Not of the file: as for `sentencepiece_vocab.set_spaces`.
    """

    tokens: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    kind: int = _UNIGRAM
    unknown: int = 0
    bos: int = 1
    eos: int = 2
    charsmap: bytes = b""
    has_prefix: bool = True
    prefixes_parts: bool = True
    is_squeezed: bool = True
    ends_words: bool = False  # whether a word's space is its last character, not its first

    def token(self, token_id: int) -> str | None:
        """Return the text of a special token; None if there is none."""
        return self.tokens[token_id] if 0 <= token_id < len(self.tokens) else None

    def backend(self) -> tokenizers.Tokenizer:
        """Build the tokenizer, which adds nothing around a text.

        Raises:
            ModelLoadError: if the vocabulary contradicts itself, or is of another kind.
        """
        if len(set(self.tokens)) != len(self.tokens):
            raise ModelLoadError("the vocabulary has the same token twice")
        if self.ends_words:
            raise ModelLoadError("words end with their space (treat_whitespace_as_suffix): not supported")
        unknown = self.unknown if self.token(self.unknown) is not None else None
        if self.kind == _BPE:
            merges = merges_by_score(self.tokens, self.types, self.scores)
            backend = sentencepiece_vocab.bpe(self.tokens, merges, unknown)
        elif self.kind == _UNIGRAM:
            has_bytes = "<0x00>" in self.tokens
            scored = list(zip(self.tokens, self.scores, strict=True))
            backend = tokenizers.Tokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=has_bytes))
        else:
            raise ModelLoadError("it cuts texts into words or characters, which is not supported")
        sentencepiece_vocab.set_spaces(
            backend,
            has_prefix=self.has_prefix,
            prefixes_parts=self.prefixes_parts,
            is_squeezed=self.is_squeezed,
            charsmap=self.charsmap,
        )
        add_tokens(backend, self.tokens, self.types, ())
        return backend


def read_model(path: Path) -> SentencepieceModel:
    """Read a file.

    Raises:
        ModelLoadError: if it cannot be read, or is not a sentencepiece model.
    """
    data = read_file(path, _MAX_BYTES).tobytes()
    try:
        return _read(data)
    except (IndexError, UnicodeDecodeError, ValueError, struct.error):
        raise ModelLoadError(f"{path} is not a sentencepiece model") from None


def _read(data: bytes) -> SentencepieceModel:
    model = SentencepieceModel()
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            _read_piece(model, value)
        elif number == 2:
            known = {3: "kind", 24: "ends_words", 40: "unknown", 41: "bos", 42: "eos"}
            for name, each in _integers(value, known):
                setattr(model, name, each)
        elif number == 3:
            for name, each in _integers(value, {3: "has_prefix", 4: "is_squeezed"}):
                setattr(model, name, bool(each))
            maps = (each for at, each in _fields(value) if at == 2 and isinstance(each, bytes))
            model.charsmap = next(maps, b"")
    if not 0 < len(model.tokens) <= MAX_TOKENS:
        raise ValueError(f"there are {len(model.tokens)} tokens")
    return model


def _read_piece(model: SentencepieceModel, data: bytes) -> None:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = str(value, "utf-8")
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    model.tokens.append(text or f"[EMPTY_{len(model.tokens)}]")
    model.scores.append(score)
    model.types.append(kind)


def _integers(data: bytes, names: dict[int, str]) -> Iterator[tuple[str, int]]:
    for number, value in _fields(data):
        if number in names and isinstance(value, int):
            yield names[number], value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield a message's fields: their number, and an integer or bytes.

    Raises:
        IndexError, ValueError: if it is cut off, or no message.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value - (1 << 64) if value >> 63 else value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field is of the kind {kind}")
        if size > len(data) - at:
            raise ValueError("the file is cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number has too many bytes")
