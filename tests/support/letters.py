"""A tokenizer of ASCII characters, and grammars compiled for it, for tiny models that write random text."""

from __future__ import annotations

from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.text.constrain.source import GrammarSource, literal

EOS = 1
MARK = 96  # "~"
# Any text, or text, the mark and digits: a minimal form of what `auto` makes of tools.
AUTO = GrammarSource(
    'start: TEXT | opening CALLS\nTEXT: /(.|\\n)*/\nopening[lazy]: /(.|\\n)*/ "~"\nCALLS: /[0-9]{6,9};/',
    free=(literal("~"),),
)


class Letters:
    """A tokenizer with a token for each ASCII character, from id 2 on."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eos_ids = frozenset({EOS})
        self.special_ids = frozenset({0, EOS})

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([32 + (token_id - 2) % 95]) if token_id >= 2 else b"<special>"

    def encode_inside(self, text: str) -> list[int]:
        return [2 + ord(character) - 32 for character in text]


def letters_grammar(source: GrammarSource, vocab_size: int) -> Grammar:
    """Return a grammar for a model with this many letters."""
    return GrammarCompiler(Letters(vocab_size), vocab_size).compile(source)
