"""Compiled grammars: which tokens may come next, computed by llguidance.

`api` compiles in a worker thread, and a runner requests masks from its own; both release the GIL meanwhile. A
mask takes 10 to 80 us, or up to 15 ms for a hostile grammar: the limits below count fuel, not time. Computing
a mask scans all text that must follow (15 us per 100 characters); after a slow mask that text is looked up
once for all its tokens.

A grammar's lexer keeps the states that it builds for all answers, up to a limit; a string with a `maxLength`
needs four to ten states per character. When the lexer is full, answers continue with a new one, which holds
only what they need.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.system import num_processors
from tgi_asgi.text.constrain.compiler_errors import reason_of, refuse_panics
from tgi_asgi.text.constrain.free_text import FreeText, FreeTexts, Watch
from tgi_asgi.text.constrain.source import GrammarSource

MAX_CACHED = 64  # compiled grammars; one uses from 10 kB to 40 MB

_MAX_MASK_THREADS = 32
_FEWEST_SHARED = 4  # fewest masks to compute on several threads: handing over costs as much as a mask (15 us)
# What preparing a grammar's lexemes may cost. A tool of eight arguments costs 5,500; agents send hundreds.
# A small grammar that costs much repeats itself. The first takes 10 ms (0.4 s and, briefly, 50 MB for nested
# counted repetitions), the last about a second.
_LEXER_FUEL, _FUEL_OF_A_CHARACTER, _MAX_LEXER_FUEL = 300_000, 5, 1_500_000
_MAX_LEXER_STATES = 20_000  # 8 MB for JSON strings, at most 40; also the most bytes of one bounded string
_IS_FULL = "too many states"  # the compiler's message about them
_SLOW_S = 0.001  # a slower mask may be due to text that must follow, so all of that is looked up

Mask = npt.NDArray[np.int32]  # [ceil(vocab_size / 32)]: bit i % 32 of word i / 32 allows token i


class Vocabulary(Protocol):
    """The part of a tokenizer that is needed here."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int, /) -> bytes:
        """Return the token's own bytes within running text."""

    def encode_inside(self, text: str) -> list[int]:
        """Turn text inside an answer into ids that have exactly its bytes."""


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
                self._backend = _make_backend(self._tokenizer, self._vocab_size)
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


class Grammar:
    """A compiled grammar, shared by all requests that use it.

    Attributes:
        source: The grammar's text.
        free: Where its answers are free, if anywhere.
    """

    __slots__ = ("_executor", "_lock", "_make", "_prototype", "free", "source")

    def __init__(self, make: Callable[[], Any], executor: Any, source: GrammarSource | None = None) -> None:
        self.source = source
        self.free: FreeText | None = None
        self._make = make
        self._prototype = make()
        self._executor = executor
        self._lock = threading.Lock()

    def watch(self) -> Watch | None:
        """Return the watch that tells when a choice needs a matcher; None if it needs one at once."""
        return None if self.free is None else self.free.watch()

    def matcher(self, token_ids: Sequence[int] = (), *, skips_free_text: bool = True) -> Matcher:
        """Return the state of a choice after the tokens that it already has.

        Args:
            skips_free_text: Whether the choice wrote free text without masks, so it may be none that the
                grammar allows: it is skipped. Otherwise it is read, as it may end inside a character.
        """
        if self.free is not None and skips_free_text:
            token_ids = self.free.constrained(token_ids)
        return Matcher(self, self._prototype, self._executor, token_ids)

    def renewed(self, full: Any) -> Any:
        """Return a prototype other than `full`, whose lexer is full; the first caller compiles it."""
        with self._lock:
            if self._prototype is full:
                self._prototype = self._make()
            return self._prototype


class Matcher:
    """One choice's progress in its grammar. For one thread at a time."""

    __slots__ = ("_backend", "_executor", "_forced", "_grammar", "_prototype", "_token_ids")

    def __init__(
        self, grammar: Grammar, prototype: Any, executor: Any, token_ids: Sequence[int] = ()
    ) -> None:
        self._grammar = grammar
        self._prototype = prototype
        self._backend = prototype.deep_copy()
        self._executor = executor
        self._forced: deque[int] = deque()  # tokens that must come next, if they were looked up
        self._token_ids = list(token_ids)  # all that it has read
        if token_ids:
            self._backend.consume_tokens(self._token_ids)
            self._has_renewed()

    @property
    def error(self) -> str | None:
        """What went wrong: the grammar is too complex here, or it was given a token it does not allow."""
        return reason_of(self._backend.get_error()) if self._backend.is_error() else None

    @property
    def is_ended(self) -> bool:
        """Whether the text is complete and nothing can follow it, or the matcher has failed."""
        return bool(self._backend.is_stopped())

    def copy(self) -> Matcher:
        """Return another matcher with the same progress."""
        made = Matcher(self._grammar, self._prototype, self._executor)
        made._backend = self._backend.deep_copy()
        made._token_ids = self._token_ids.copy()
        made._forced.extend(self._forced)
        return made

    def fill_mask(self, mask: Mask) -> None:
        """Write which tokens may come next; EOS only if the text may end here. Check `error` afterwards."""
        if self._fill_forced(mask):
            return
        begun_s = time.perf_counter()
        self._compute(mask)
        if self._has_renewed():
            self._compute(mask)
        if time.perf_counter() - begun_s > _SLOW_S:
            self._look_ahead(mask)

    def accept(self, token_id: int) -> None:
        """Advance by a token. Check `error` afterwards."""
        if self._forced and self._forced.popleft() != token_id:
            self._forced.clear()
        self._token_ids.append(token_id)
        self._backend.consume_token(token_id)
        self._has_renewed()

    def _compute(self, mask: Mask) -> None:
        try:
            self._backend.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        except ValueError:  # the matcher holds the reason
            if self.error is None:
                raise

    def _has_renewed(self) -> bool:
        """Continue with a new lexer if this one is full, perhaps of other answers; return whether it was."""
        if not self._backend.is_error() or _IS_FULL not in self._backend.get_error():
            return False
        self._prototype = self._grammar.renewed(self._prototype)
        self._backend = self._prototype.deep_copy()
        self._backend.consume_tokens(self._token_ids)
        return True

    def _fill_forced(self, mask: Mask) -> bool:
        """Write the mask of the token that must come next, if it is known; return whether it is."""
        if not self._forced:
            return False
        mask[:] = 0
        mask.view(np.uint32)[self._forced[0] // 32] = 1 << self._forced[0] % 32
        return True

    def _look_ahead(self, mask: Mask) -> None:
        """If only one token may come, look up all that must follow, to save computing the next masks."""
        words = mask[np.flatnonzero(mask)].view(np.uint32)
        if words.size == 1 and int(words[0]).bit_count() == 1:
            self._forced.extend(self.forced_ids())

    def forced_ids(self) -> list[int]:
        """Return the tokens that must come next, if there is one text and one way to write it; or none."""
        ahead = self._backend.deep_copy()  # takes 1 to 10 us; an error ahead must not end this matcher
        return list(ahead.compute_ff_tokens())

    @staticmethod
    def fill_masks(matchers: Sequence[Matcher], rows: Sequence[int], masks: Mask) -> None:
        """Write the masks of several matchers to rows of masks [n_rows, n_words]; many use all cores.

        Check each matcher's `error` afterwards.
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
        for matcher, row in todo:
            if matcher._has_renewed():
                matcher._compute(masks[row])
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


def _make_backend(tokenizer: Vocabulary, vocab_size: int) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    eos_ids = sorted(token_id for token_id in tokenizer.eos_ids if token_id < vocab_size)
    vocabulary = TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, eos_ids[0]))
    return LLTokenizer(vocabulary, eos_token=eos_ids)


def _make_executor() -> Any:
    """Start the threads that share the masks of a step."""
    from llguidance import LLExecutor

    return LLExecutor(num_threads=min(num_processors(), _MAX_MASK_THREADS))


class _Vocabulary:
    """A tokenizer in the shape that llguidance reads."""

    def __init__(self, tokenizer: Vocabulary, vocab_size: int, eos_id: int) -> None:
        size = min(tokenizer.vocab_size, vocab_size)
        tokens = [tokenizer.token_bytes(token_id) for token_id in range(size)]
        self.tokens = tokens + [b""] * (vocab_size - size)
        self.special_token_ids = sorted(each for each in tokenizer.special_ids if each < vocab_size)
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode_inside(text)
