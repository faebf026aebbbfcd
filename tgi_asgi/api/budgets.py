"""Bounds of the bytes that all requests together hold: bodies, images, and answers until they are sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tgi_asgi.errors import InvalidRequest, Overloaded, TgiError

_TOKEN_BYTES = 256  # a token's event
_LOGPROB_BYTES = 200  # a log-probability: packed, as JSON, and in the body


class ByteBudget:
    """A limit of bytes of `what` held at a time, over all requests."""

    def __init__(self, max_bytes: int, what: str) -> None:
        self._max_bytes = max_bytes
        self._what = what
        self.held = 0

    def acquire(self, size: int, num_held: int = 0) -> None:
        """Hold `size` more bytes for a request that already holds `num_held`.

        Raises:
            Overloaded: if there are too many now.
        """
        # A request on its own has other limits.
        if self.held > num_held and self.held + size > self._max_bytes:
            raise Overloaded(f"The server holds as many {self._what} as it may")
        self.held += size

    def release(self, size: int) -> None:
        """Release bytes that were acquired."""
        self.held -= size


def token_bytes(num_top: int | None) -> int:
    """Return the bytes of a token with its log-probability and `num_top` alternatives; None: without any."""
    return _TOKEN_BYTES + (0 if num_top is None else _LOGPROB_BYTES * (1 + num_top))


@dataclass(slots=True, eq=False)
class KeptAnswer:
    """One answer's part of the memory.

    Attributes:
        param: The client's name of the field that makes the answer large.
        advice: What the client may do if its answer is too large.
        prompt_bytes: Bytes of the prompts' log-probabilities.
        token_bytes: Bytes of each token that arrives.
    """

    memory: AnswerMemory
    tenant: str | None
    param: str
    advice: str
    prompt_bytes: int
    token_bytes: int
    num_bytes: int = 0
    refuse: Callable[[TgiError], None] = field(init=False)

    def begin(self, refuse: Callable[[TgiError], None]) -> None:
        """Count the prompts; `refuse` is called once with the error if the request must end."""
        self.refuse = refuse
        self.memory.begin(self)
        self.memory.add(self, self.prompt_bytes)

    def end(self) -> None:
        """Note that the answer is complete: it only has to be sent."""
        self.memory.end(self)

    def add_tokens(self, count: int) -> None:
        """Count tokens that have arrived; may call `refuse`, of this answer or another."""
        self.memory.add(self, count * self.token_bytes)


class AnswerMemory:
    """Counts the bytes of all answers that are kept until they are sent. Used on the event loop only.

    They are counted as tokens arrive, because the length of an answer is not known before. If they exceed the
    limit, the largest answer of the key that holds most fails. Small answers never fail, however much others
    hold.

    Attributes:
        held: Bytes of all of them together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._small = max_bytes // 1024  # an answer may always have these bytes
        self._growing: set[KeptAnswer] = set()
        self.held = 0

    @contextmanager
    def keeping(self, answer: KeptAnswer) -> Iterator[KeptAnswer]:
        """Count an answer's bytes, once it begins, until the context ends."""
        try:
            yield answer
        finally:
            self.end(answer)
            self._release(answer)

    def begin(self, answer: KeptAnswer) -> None:
        """From now on, count what is added to an answer, and refuse it if it is too large."""
        self._growing.add(answer)

    def add(self, answer: KeptAnswer, size: int) -> None:
        """Count bytes of an answer, unless it has been refused."""
        if answer not in self._growing:
            return
        answer.num_bytes += size
        self.held += size
        while self.held > self._max_bytes and self._refuse_largest():
            pass

    def end(self, answer: KeptAnswer) -> None:
        """Note that an answer is complete, and can no longer be refused; its bytes still count."""
        self._growing.discard(answer)

    def _refuse_largest(self) -> bool:
        """Refuse an answer; return False if all that could be are small."""
        by_tenant: Counter[str | None] = Counter()
        for answer in self._growing:
            by_tenant[answer.tenant] += answer.num_bytes
        large = [answer for answer in self._growing if answer.num_bytes > self._small]
        if not large:
            return False
        largest = max(large, key=lambda each: (by_tenant[each.tenant], each.num_bytes))
        error: TgiError = Overloaded("The server keeps as many bytes of unsent answers as it may")
        if largest.num_bytes > self._max_bytes:
            what = f"`{largest.param}`: the answer takes more than {self._max_bytes} bytes until it is sent"
            error = InvalidRequest(f"{what}. {largest.advice}", param=largest.param)
        self.end(largest)
        self._release(largest)
        largest.refuse(error)
        return True

    def _release(self, answer: KeptAnswer) -> None:
        self.held -= answer.num_bytes
        answer.num_bytes = 0
