"""Read tiktoken's vocabularies, for checkpoints that have no tokenizer.json: Qwen 1's and GLM-4's.

A line of the file has a token's bytes in base64, and its id. What else a tokenizer needs is in the code
beside it, and known here by the name of its class. Called by `older_files.py`.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import read_file
from tgi_asgi.text.gguf_splits import SPLITS, Split
from tgi_asgi.text.sentencepiece_vocab import MAX_TOKENS, NORMAL, merges_by_score
from tgi_asgi.text.token_bytes import byte_alphabet

_MAX_BYTES = 100_000_000  # the largest in use have 3 MB


@dataclass(frozen=True, slots=True)
class TiktokenClass:
    """What the code of a class of tokenizers says.

    Attributes:
        file: The name of the vocabulary.
        special: Tokens whose ids follow the vocabulary's.
        named: Their names, as in tokenizer_config.json; `eot_token` ends an answer besides `eos_token`.
        prefix: Tokens before each text, of those that the configuration lists.
    """

    file: str
    split: Split
    special: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()


CLASSES = {
    "QWenTokenizer": TiktokenClass(
        "qwen.tiktoken",
        SPLITS["qwen2"],
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205))),
        {"eos_token": "<|endoftext|>", "eot_token": "<|im_end|>"},
    ),
    "ChatGLM4Tokenizer": TiktokenClass("tokenizer.model", SPLITS["glm4"], prefix=("[gMASK]", "<sop>")),
}


def is_tiktoken(path: Path) -> bool:
    """Return whether a file is a list of ranks in base64, which begins with text, and not sentencepiece's."""
    with path.open("rb") as file:
        line = file.readline(1000)
    parts = line.split()
    return line.isascii() and len(parts) == 2 and parts[1].isdigit()


def read_tiktoken(path: Path, kind: TiktokenClass) -> tokenizers.Tokenizer:
    """Build the tokenizer of a file, which adds nothing around a text.

    Two neighbours merge if they are a token together, those of the lowest id first. A piece of the text that
    is a token stays whole.

    Raises:
        ModelLoadError: if it cannot be read, or is not such a vocabulary.
    """
    data = read_file(path, _MAX_BYTES).tobytes()
    try:
        tokens = _read_tokens(data)
    except (ValueError, binascii.Error):
        raise ModelLoadError(f"{path} is not a tiktoken vocabulary") from None
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    texts = ["".join(map(letters.__getitem__, token)) for token in tokens]
    merges = merges_by_score(texts, [NORMAL] * len(texts), range(0, -len(texts), -1))
    vocab = dict(zip(texts, range(len(texts)), strict=True))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = kind.split.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    if kind.split.normalizes:
        backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in kind.special])
    return backend


def _read_tokens(data: bytes) -> list[bytes]:
    """Return the tokens in the order of their ids.

    Raises:
        ValueError: if ids are not 0, 1, 2 ..., a token occurs twice, or a byte is none.
    """
    pairs = [line.split() for line in data.splitlines() if line]
    found = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    tokens = sorted(found, key=found.__getitem__)
    is_whole = [found[token] for token in tokens] == list(range(len(pairs))) and len(pairs) <= MAX_TOKENS
    if not is_whole or any(bytes([byte]) not in found for byte in range(256)):
        raise ValueError
    return tokens
