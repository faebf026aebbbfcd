"""What grammars accept, token by token, on a vocabulary of bytes and of texts that are single tokens."""

from __future__ import annotations

import functools
import random
import re

import numpy as np

from tests.support.toy_tokenizer import EOS, IM_END, VOCAB_SIZE, ToyTokenizer
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.grammar import Matcher
from tgi_asgi.text.constrain.source import GrammarSource, literal

NUM_WORDS = -(-VOCAB_SIZE // 32)
_FIRST = 300  # id of the first text that is a single token


def mask_of(matcher: Matcher) -> np.ndarray:
    """Return a bit for each token that may come next."""
    mask = np.zeros(NUM_WORDS, np.int32)
    matcher.fill_mask(mask)
    assert matcher.error is None
    return mask


def allowed(matcher: Matcher) -> list[int]:
    """Return the tokens that may come next."""
    bits = np.unpackbits(mask_of(matcher).view(np.uint8), bitorder="little")
    found: list[int] = np.flatnonzero(bits).tolist()
    return found


def allows(matcher: Matcher, token_id: int) -> bool:
    """Return whether `allowed` has the token; it is asked for each byte of thousands of texts."""
    return bool(int(mask_of(matcher)[token_id // 32]) >> token_id % 32 & 1)


def accepts(compiler: GrammarCompiler, source: GrammarSource, text: str) -> bool:
    """Return whether the grammar accepts a whole text, token by token."""
    matcher = compiler.compile(source).matcher()
    for byte in text.encode():
        if not allows(matcher, byte):
            return False
        matcher.accept(byte)
    return matcher.is_ended or allows(matcher, EOS)


def random_walk(compiler: GrammarCompiler, source: GrammarSource, rng: random.Random, limit: int) -> str:
    """Sample allowed tokens at random until the text ends, which it must within `limit`."""
    matcher = compiler.compile(source).matcher()
    data = bytearray()
    while not matcher.is_ended:
        tokens = allowed(matcher)
        # Ends and quotes are rare among all bytes, so they are preferred if allowed; otherwise texts would
        # not end.
        ends = [token for token in tokens if token in (EOS, *b'"}],')]
        token = rng.choice(ends if ends and rng.random() < 0.7 else tokens)
        if token in (EOS, IM_END):
            break
        data.append(token)
        matcher.accept(token)
        assert len(data) <= limit
    return data.decode()


class Marked(ToyTokenizer):
    """The toy tokenizer's bytes, with single tokens for some texts."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts = tuple(texts)
        self._special = {**self._special, **{_FIRST + index: text for index, text in enumerate(texts)}}
        self.special_ids = frozenset(self._special)

    def mark(self, text: str) -> str:
        """Return a text as grammars spell it: as a token if it is one."""
        ids = {given: token_id for token_id, given in self._special.items()}
        return f"<[{ids[text]}]>" if text in ids else literal(text)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        known = sorted((given for token_id, given in self._special.items() if token_id >= _FIRST), key=len)
        parts = re.split("(" + "|".join(map(re.escape, reversed(known))) + ")", text) if known else [text]
        ids = {given: token_id for token_id, given in self._special.items()}
        return [i for part in parts for i in ([ids[part]] if part in known else list(part.encode()))]


@functools.lru_cache(maxsize=64)
def _compiler(texts: tuple[str, ...]) -> GrammarCompiler:
    """Return the compiler of a vocabulary; it starts threads, and its trie takes longer than a grammar."""
    return GrammarCompiler(Marked([*texts]), VOCAB_SIZE)


def takes(tokenizer: Marked, source: GrammarSource | None, text: str) -> bool:
    """Return whether a grammar accepts a whole text; check that skipping its free text changes nothing."""
    assert source is not None
    compiled = _compiler(tokenizer.texts).compile(source)
    matcher = compiled.matcher()
    for token_id in tokenizer.ids(text):
        if not allows(matcher, token_id):
            return False
        matcher.accept(token_id)
    is_taken = matcher.is_ended or allows(matcher, EOS)
    shorter = compiled.matcher(tokenizer.ids(text))  # does not read the free text
    assert shorter.is_ended == matcher.is_ended and allows(shorter, EOS) == allows(matcher, EOS)
    return is_taken
