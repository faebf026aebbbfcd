"""Compiles grammars for one vocabulary, by llguidance, and keeps those used last.

Called by `api`, in a worker thread; llguidance releases the GIL meanwhile.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import partial
from typing import Any

import numpy as np

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.system import num_processors
from tgi_asgi.text.constrain.compiler_errors import reason_of, refuse_panics
from tgi_asgi.text.constrain.free_search import FreeTexts
from tgi_asgi.text.constrain.grammar import Grammar, Mask
from tgi_asgi.text.constrain.source import GrammarSource
from tgi_asgi.text.constrain.vocabulary import Vocabulary, make_backend

MAX_CACHED = 64  # compiled grammars; one uses from 10 kB to 40 MB

_MAX_MASK_THREADS = 32
# What preparing a grammar's lexemes may cost. A tool of eight arguments costs 5,500; agents send hundreds.
# A small grammar that costs much repeats itself. The first takes 10 ms (0.4 s and, briefly, 50 MB for nested
# counted repetitions), the last about a second.
_LEXER_FUEL, _FUEL_OF_A_CHARACTER, _MAX_LEXER_FUEL = 300_000, 5, 1_500_000
_MAX_LEXER_STATES = 20_000  # 8 MB for JSON strings, at most 40; also the most bytes of one bounded string


class GrammarCompiler:
    """A compiler of grammars for one vocabulary, with a cache of those used last.

    Cheap to construct: the trie over the vocabulary, 0.3 s for 50,000 tokens, is built with the first
    grammar. All methods may be called from several threads at once.

    Args:
        vocab_size: Number of the model's logits, which may exceed the tokenizer's number of tokens.
    """

    def __init__(self, tokenizer: Vocabulary, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._backend: Any = None
        self._executor: Any = None
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, Grammar | str] = OrderedDict()  # or why it was refused
        self._free_texts = FreeTexts(tokenizer, vocab_size)

    def compile(self, source: GrammarSource) -> Grammar:
        """Compile a grammar, which takes milliseconds, and up to a second for the largest.

        Raises:
            InvalidRequest: if it is not valid, too complex, or contains something that cannot be enforced;
                the message says what.
        """
        if min(self._tokenizer.eos_ids, default=self._vocab_size) >= self._vocab_size:
            raise InvalidRequest("grammar is not supported: the model has no token that ends a text")
        text = source.text
        with self._lock:
            found = self._compiled.get(text)
            if found is not None:
                self._compiled.move_to_end(text)
            elif self._backend is None:
                self._backend = make_backend(self._tokenizer, self._vocab_size)
                self._executor = _make_executor()
        if found is None:
            try:
                found = self._compile(source, text)
            except InvalidRequest as error:  # takes as long, and agents send their tools with each request
                found = error.message
            with self._lock:
                self._compiled[text] = found
                while len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
        if isinstance(found, str):
            raise InvalidRequest(found)
        return found

    def _compile(self, source: GrammarSource, text: str) -> Grammar:
        grammar = Grammar(partial(_make_matcher, self._backend, text), self._executor, source)
        # The first mask builds most of the lexer, which copies share; do that here and not while a batch
        # waits. Some grammars are too complex only after their first token, and one whose text has no end
        # after the second.
        mask = np.zeros(-(-self._vocab_size // 32), np.int32)
        matcher = grammar.matcher()
        for _ in range(3):
            matcher.fill_mask(mask)
            token_id = None if matcher.error else _first_allowed(mask)
            if token_id is None or token_id in self._tokenizer.eos_ids:
                break
            matcher.accept(token_id)
        if matcher.error is not None:
            raise InvalidRequest(f"grammar is not valid: {matcher.error}")
        grammar.free = self._free_texts.find(source, grammar.matcher)
        return grammar


def _first_allowed(mask: Mask) -> int | None:
    words = np.flatnonzero(mask)
    if not words.size:
        return None
    word = int(mask[words[0]])
    return 32 * int(words[0]) + ((word & -word).bit_length() - 1) % 32


def _make_matcher(backend: Any, text: str) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        max_items_in_row=10_000,  # enough for an object of 2,000 optional properties
        initial_lexer_fuel=min(_LEXER_FUEL + _FUEL_OF_A_CHARACTER * len(text), _MAX_LEXER_FUEL),
        step_lexer_fuel=200_000,  # 15 ms
        step_max_items=50_000,  # 3 ms
        max_lexer_states=_MAX_LEXER_STATES,
        max_grammar_size=200_000,
        verbose_errors=False,
    )
    with refuse_panics():
        matcher = LLMatcher(backend, text, log_level=0, limits=limits)
    if matcher.is_error():
        raise InvalidRequest(f"grammar is not valid: {reason_of(matcher.get_error())}")
    return matcher


def _make_executor() -> Any:
    """Start the threads that share the masks of a step."""
    from llguidance import LLExecutor

    return LLExecutor(num_threads=min(num_processors(), _MAX_MASK_THREADS))
