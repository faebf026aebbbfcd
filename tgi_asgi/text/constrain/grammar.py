"""Compiled grammars: which tokens may come next, computed by llguidance.

A runner requests masks from its own thread; the GIL is released meanwhile. A mask takes 10 to 80 us, or up to
15 ms for a hostile grammar: the compiler's limits count fuel, not time. Computing a mask scans all text that
must follow (15 us per 100 characters); after a slow mask that text is looked up once for all its tokens.

A grammar's lexer keeps the states that it builds for all answers, up to a limit; a string with a `maxLength`
needs four to ten states per character. When the lexer is full, answers continue with a new one, which holds
only what they need.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.text.constrain.compiler_errors import reason_of
from tgi_asgi.text.constrain.free_text import FreeText, Watch
from tgi_asgi.text.constrain.source import GrammarSource

_FEWEST_SHARED = 4  # fewest masks to compute on several threads: handing over costs as much as a mask (15 us)
_IS_FULL = "too many states"  # the compiler's message about them
_SLOW_S = 0.001  # a slower mask may be due to text that must follow, so all of that is looked up

Mask = npt.NDArray[np.int32]  # [ceil(vocab_size / 32)]: bit i % 32 of word i / 32 allows token i


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
            skips_free_text: Whether the choice wrote its free text without masks. The grammar may not allow
                all of it, so it is skipped. Free text under masks is read: it may end inside a character.
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
