"""Compiled grammars: which tokens may come next, computed by llguidance.

`api` compiles in a worker thread, a runner asks for masks from its own; both release the GIL meanwhile.
A mask costs 10 to 80 us, up to 15 ms for a grammar made to hurt: the limits below are fuel, not time. It
looks at all the text that must follow (15 us for 100 characters): behind a slow one that is looked up once.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain.free import FreeText, FreeTexts, Watch
from tgi_asgi.text.constrain.reason import reason_of, refusing_panics
from tgi_asgi.text.constrain.source import GrammarSource

MAX_CACHED = 64  # compiled grammars; one takes from 10 kB to 20 MB

_MAX_MASK_THREADS = 32
_FEWEST_SHARED = 4  # masks that several threads compute: handing over costs as much as one does (15 us)
_SLOW_S = (
    0.001  # a mask that takes longer may be slow for the text that must follow, and all of it is looked at
)

Mask = npt.NDArray[np.int32]  # [ceil(vocab_size / 32)]: bit i % 32 of word i / 32 allows token i


class Vocabulary(Protocol):
    """What is needed of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int, /) -> bytes:
        """Return the token's own bytes in running text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Turn text into ids."""


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and remembers those used last.

    Made without work: the trie over the vocabulary, 0.3 s for 50,000 tokens, waits for the first grammar. All
    methods may be called from several threads at once.

    Args:
        vocab_size: of the model's logits, which may have more columns than the tokenizer tokens.
    """

    def __init__(self, tokenizer: Vocabulary, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._backend: Any = None
        self._executor: Any = None
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()
        self._free_texts = FreeTexts(tokenizer, vocab_size)

    def compile(self, source: GrammarSource) -> Grammar:
        """Compile a grammar: milliseconds, up to a second for the largest.

        Raises:
            InvalidRequest: it is not valid, too complex, or holds what cannot be enforced; the message says
                what.
        """
        if not self._tokenizer.eos_ids:
            raise InvalidRequest("grammar is not supported: the model has no token that ends a text")
        text = source.text
        with self._lock:
            known = self._compiled.get(text)
            if known is not None:
                self._compiled.move_to_end(text)
                return known
            if self._backend is None:
                self._backend = _make_backend(self._tokenizer, self._vocab_size)
                self._executor = _make_executor()
        backend = _make_matcher(self._backend, text)
        # The first mask builds most of the lexer, which copies share: here, and not while a batch waits.
        # Some are too complex behind their first token only.
        mask = np.zeros(-(-self._vocab_size // 32), np.int32)
        grammar = Grammar(backend, self._executor)
        for matcher in (Matcher(backend, self._executor), grammar.matcher()):
            token_id = _first_allowed(mask)
            if token_id is not None and token_id not in self._tokenizer.eos_ids:
                matcher.accept(token_id)
            matcher.fill_mask(mask)
            if matcher.error is not None:
                raise InvalidRequest(f"grammar is not valid: {matcher.error}")
        grammar = Grammar(backend, self._executor, self._free_texts.find(source, grammar.matcher), source)
        with self._lock:
            self._compiled[text] = grammar
            while len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        return grammar


class Grammar:
    """A compiled grammar, shared by all requests that use it; `source` is what it was compiled from."""

    __slots__ = ("_executor", "_free", "_prototype", "source")

    def __init__(
        self,
        prototype: Any,
        executor: Any,
        free: FreeText | None = None,
        source: GrammarSource | None = None,
    ) -> None:
        self.source = source
        self._prototype = prototype
        self._executor = executor
        self._free = free

    def watch(self) -> Watch | None:
        """Return what says from where on a choice needs a matcher; None if that is from its beginning."""
        return None if self._free is None else self._free.watch()

    def matcher(self, token_ids: Sequence[int] = ()) -> Matcher:
        """Return the state of one choice, after the tokens that it has already; free text is not read."""
        if self._free is not None:
            token_ids = self._free.constrained(token_ids)
        return Matcher(self._prototype.deep_copy(), self._executor, token_ids)


class Matcher:
    """How far one choice has come in its grammar. For one thread at a time."""

    __slots__ = ("_backend", "_executor", "_forced")

    def __init__(self, backend: Any, executor: Any, token_ids: Sequence[int] = ()) -> None:
        self._backend = backend
        self._executor = executor
        self._forced: deque[int] = deque()  # what must come next, where it was looked up
        if token_ids:
            backend.consume_tokens(list(token_ids))

    @property
    def error(self) -> str | None:
        """What went wrong: the grammar is too complex here, or was given a token that it does not allow."""
        return reason_of(self._backend.get_error()) if self._backend.is_error() else None

    @property
    def is_ended(self) -> bool:
        """Whether the text is complete and nothing can follow it, or the matcher has failed."""
        return bool(self._backend.is_stopped())

    def copy(self) -> Matcher:
        """Return another one that has come as far."""
        made = Matcher(self._backend.deep_copy(), self._executor)
        made._forced.extend(self._forced)
        return made

    def fill_mask(self, mask: Mask) -> None:
        """Write which tokens may come next: EOS only where the text may end. See `error` afterwards."""
        if self._fill_forced(mask):
            return
        begun_s = time.perf_counter()
        try:
            self._backend.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        except ValueError:  # the matcher holds the reason
            if self.error is None:
                raise
        if time.perf_counter() - begun_s > _SLOW_S:
            self._look_ahead(mask)

    def accept(self, token_id: int) -> None:
        """Move on by a token. See `error` afterwards."""
        if self._forced and self._forced.popleft() != token_id:
            self._forced.clear()
        self._backend.consume_token(token_id)

    def _fill_forced(self, mask: Mask) -> bool:
        """Write the mask of a token that is known to come next; tell whether one is."""
        if not self._forced:
            return False
        mask[:] = 0
        mask.view(np.uint32)[self._forced[0] // 32] = 1 << self._forced[0] % 32
        return True

    def _look_ahead(self, mask: Mask) -> None:
        """Where one token may come, find out what must follow it: the next masks need no computing."""
        words = mask[np.flatnonzero(mask)].view(np.uint32)
        if words.size == 1 and int(words[0]).bit_count() == 1:
            self._forced.extend(self.forced_ids())

    def forced_ids(self) -> list[int]:
        """Return the tokens that must come next, where there is one text and one way to write it; or none."""
        return list(self._backend.compute_ff_tokens())

    @staticmethod
    def fill_masks(matchers: Sequence[Matcher], rows: Sequence[int], masks: Mask) -> None:
        """Write the masks of several matchers to rows of masks [n_rows, n_words]; many of them on all cores.

        See each one's `error` afterwards.
        """
        todo = [
            (matcher, row)
            for matcher, row in zip(matchers, rows, strict=True)
            if not matcher._fill_forced(masks[row])
        ]
        if len(todo) < _FEWEST_SHARED:
            for matcher, row in todo:
                matcher.fill_mask(masks[row])
            return
        begun_s = time.perf_counter()
        pairs = [(matcher._backend, row) for matcher, row in todo]
        matchers[0]._executor.unsafe_compute_mask_ptr(pairs, masks.ctypes.data, masks.strides[0], len(masks))
        if time.perf_counter() - begun_s > _SLOW_S * max(1, len(todo) / 8):
            for matcher, row in todo:
                matcher._look_ahead(masks[row])


def _first_allowed(mask: Mask) -> int | None:
    words = np.flatnonzero(mask)
    if not words.size:
        return None
    word = int(mask[words[0]])
    return 32 * int(words[0]) + ((word & -word).bit_length() - 1) % 32


def _make_matcher(backend: Any, text: str) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        max_items_in_row=10_000,  # an object of 2,000 optional properties
        initial_lexer_fuel=300_000,  # 10 ms; 0.4 s and 50 MB, for a while, if counted repetitions are nested
        step_lexer_fuel=200_000,  # 15 ms
        step_max_items=50_000,  # 3 ms
        max_lexer_states=10_000,  # 20 MB
        max_grammar_size=200_000,
        verbose_errors=False,
    )
    with refusing_panics():
        matcher = LLMatcher(backend, text, log_level=0, limits=limits)
    if matcher.is_error():
        raise InvalidRequest(f"grammar is not valid: {reason_of(matcher.get_error())}")
    return matcher


def _make_backend(tokenizer: Vocabulary, vocab_size: int) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    vocabulary = TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
    return LLTokenizer(vocabulary, eos_token=sorted(tokenizer.eos_ids))


def _make_executor() -> Any:
    """Start the threads that share the masks of a step."""
    from llguidance import LLExecutor

    cores = (
        len(os.sched_getaffinity(os.getpid())) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return LLExecutor(num_threads=min(cores, _MAX_MASK_THREADS))


class _Vocabulary:
    """A tokenizer in the shape that llguidance reads."""

    def __init__(self, tokenizer: Vocabulary, vocab_size: int) -> None:
        size = min(tokenizer.vocab_size, vocab_size)
        tokens = [tokenizer.token_bytes(token_id) for token_id in range(size)]
        self.tokens = tokens + [b""] * (vocab_size - size)
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.eos_token_id = min(tokenizer.eos_ids)
        self.bos_token_id = None
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
