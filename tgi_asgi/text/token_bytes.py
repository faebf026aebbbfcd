"""The bytes that each token stands for in running text, so that a stream needs no decoder.

Four kinds are supported: byte-level vocabularies (GPT-2's alphabet, one printable character per byte),
sentencepiece vocabularies ("▁" for a space, "<0x0A>" for a byte), BERT's word pieces ("##" if no word
begins), and vocabularies without marks: of words, whose tokenizer has no decoder, and of characters, whose
decoder is "Fuse". Other decoders name the marks of a space and of a word piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers

from tgi_asgi.errors import ModelLoadError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet, character -> byte: printable bytes map to themselves, others to U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


def token_byte_table(backend: tokenizers.Tokenizer) -> list[bytes]:
    """Build the table, by id. An added token's text stands for itself, except for sentencepiece's spaces.

    Raises:
        ModelLoadError: if the vocabulary is of another family.
    """
    added = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
    vocab = backend.get_vocab(with_added_tokens=True)
    size = max(vocab.values(), default=-1) + 1
    if size > 2 * len(vocab) + 1024:  # a hostile file may give a token a huge id
        raise ModelLoadError(f"the tokenizer has {len(vocab)} tokens but ids up to {size - 1}")
    pieces = {token_id: text for text, token_id in vocab.items() if token_id not in added}
    table = [b""] * size
    for token_id, text in added.items():
        table[token_id] = text.encode("utf-8", "replace")
    steps = _steps_of(backend)
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        _fill_byte_level(table, pieces)
    elif kinds & {"ByteFallback", "Metaspace"}:
        changes = [change for step in steps if (change := _change_of(step)) is not None]
        _fill_sentencepiece(table, pieces, changes)
        for token_id, text in added.items():  # Gemma's runs of spaces are added tokens
            table[token_id] = _changed(text, changes)
    elif "WordPiece" in kinds:
        prefix = next(step["prefix"] for step in steps if step["type"] == "WordPiece")
        for token_id, text in pieces.items():
            inside = text.removeprefix(prefix)
            table[token_id] = (f" {text}" if inside == text else inside).encode("utf-8", "replace")
    elif kinds <= {"Fuse"}:
        space = "" if kinds else " "  # without a decoder, `tokenizers` joins tokens with spaces
        for token_id, text in pieces.items():
            table[token_id] = f"{space}{text}".encode("utf-8", "replace")
    else:
        raise ModelLoadError(
            f"the tokenizer's decoder ({', '.join(sorted(kinds))}) is not supported; byte-level and "
            "sentencepiece vocabularies, word pieces, words and characters are"
        )
    return table


def _steps_of(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """Return the decoder's steps."""
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = state.get("decoders", [state])
    return steps


def _change_of(step: Mapping[str, Any]) -> Callable[[str], str] | None:
    """Return how a decoder's step changes the marks in a piece, if it does."""
    match step:
        case {"type": "Metaspace", "replacement": mark}:
            return lambda text: text.replace(mark, " ")
        case {"type": "Replace", "pattern": {"String": mark}, "content": content}:
            return lambda text: text.replace(mark, content)
        case {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}:
            return tokenizers.normalizers.Replace(tokenizers.Regex(pattern), content).normalize_str
    return None


def _changed(text: str, changes: Sequence[Callable[[str], str]]) -> bytes:
    for change in changes:
        text = change(text)
    return text.encode("utf-8", "replace")


def _fill_byte_level(table: list[bytes], pieces: Mapping[int, str]) -> None:
    """Translate all pieces at once (one by one takes three times as long: 60 ms for 49,000)."""
    alphabet = byte_alphabet()
    if set("".join(pieces.values())) - alphabet.keys():
        # As in the decoder, a piece with any other character stands for its own text.
        is_foreign = re.compile(f"[^{re.escape(''.join(alphabet))}]").search
        foreign = {token_id: text for token_id, text in pieces.items() if is_foreign(text)}
        for token_id, text in foreign.items():
            table[token_id] = text.encode("utf-8", "replace")
        pieces = {token_id: text for token_id, text in pieces.items() if token_id not in foreign}
    places = {ord(character): chr(byte) for character, byte in alphabet.items()}
    data = "".join(pieces.values()).translate(places).encode("latin-1")
    at = 0
    for token_id, text in pieces.items():
        table[token_id] = data[at : at + len(text)]
        at += len(text)


def _fill_sentencepiece(
    table: list[bytes], pieces: Mapping[int, str], changes: Sequence[Callable[[str], str]]
) -> None:
    for token_id, text in pieces.items():
        byte = _BYTE_PIECE.fullmatch(text) if len(text) == 6 else None  # the length is faster to compare
        table[token_id] = bytes([int(byte[1], 16)]) if byte else _changed(text, changes)
