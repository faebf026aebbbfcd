"""Chooses the replica for a prompt, by what each is known to have cached and by its load.

The ingress keeps one table per model. Pure Python, on one event loop.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence

from tgi_asgi.cluster.wire import CacheVersion, Report, split_digests

# Cost of a running stream to a concurrent prompt, in prompt tokens: a row of each step until it ends.
STREAM_TOKENS = 32
_EXPECTED_S = 30.0  # by then a prompt has filled its blocks, or never will


class KnownReplica:
    """An ingress's knowledge of a replica.

    Its reports say what it has cached, up to a second late. Until then, the blocks of prompts that were sent
    to it are expected there, because the next turn of a conversation may come sooner than a report.

    Attributes:
        adapters: Names and keys of the adapters that it serves.
        num_open: Number of its requests from this ingress.
        num_foreign: Number of its requests from other ingresses, by its last report.
        num_missed: Number of consecutive reports that did not arrive in time.
    """

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.cache_version = CacheVersion()
        self.adapters: Mapping[str, str] = {}
        self.num_open = 0
        self.num_foreign = 0
        self.num_missed = 0
        self._has_states = False
        self._load_tokens = 0
        self._clock = clock
        self._held: set[bytes] = set()
        self._expected: OrderedDict[bytes, float] = OrderedDict()

    @property
    def num_blocks(self) -> int:
        """Number of cached blocks, by its last report."""
        return len(self._held)

    @property
    def load(self) -> int:
        """Its pending work, in prompt tokens."""
        return self._load_tokens + STREAM_TOKENS * (self.num_open + self.num_foreign)

    def num_held(self, digests: Sequence[bytes]) -> int:
        """Return after how many blocks of a prompt's prefix it can resume."""
        held, expected = self._held, self._expected
        if self._has_states:
            for number in range(len(digests), 0, -1):
                if digests[number - 1] in held or digests[number - 1] in expected:
                    return number
            return 0
        for number, digest in enumerate(digests):
            if digest not in held and digest not in expected:
                return number
        return len(digests)

    def expect(self, digests: Sequence[bytes]) -> None:
        """Record that a prompt was sent that fills these blocks; a state is kept after the last."""
        now_s = self._clock()
        for digest in digests[-1:] if self._has_states else digests:
            self._expected[digest] = now_s
            self._expected.move_to_end(digest)

    def forget(self) -> None:
        """Record that it has dropped everything cached."""
        self._held.clear()
        self._expected.clear()

    def update(self, report: Report) -> None:
        """Apply its report."""
        if report.is_whole:
            self._held.clear()
        for digest in split_digests(report.found):
            self._held.add(digest)
            self._expected.pop(digest, None)
        for digest in split_digests(report.lost):
            self._held.discard(digest)
            self._expected.pop(digest, None)
        oldest_s = self._clock() - _EXPECTED_S
        while self._expected and next(iter(self._expected.values())) < oldest_s:
            self._expected.popitem(last=False)
        self.cache_version, self.adapters = report.cache_version, report.adapters
        self._has_states = report.has_states
        self.num_foreign = max(report.num_open - self.num_open, 0)
        self.num_missed = 0


class Ticket:
    """A request's share of a replica's load, until it ends."""

    def __init__(self, replica: KnownReplica, num_new_tokens: int) -> None:
        self.replica = replica
        self._num_new_tokens = num_new_tokens
        self._is_open = True
        replica.num_open += 1
        replica._load_tokens += num_new_tokens

    def begin(self) -> None:
        """Record that the prompt has been computed. Idempotent."""
        self.replica._load_tokens -= self._num_new_tokens
        self._num_new_tokens = 0

    def end(self) -> None:
        """Record that the request has ended. Idempotent."""
        if self._is_open:
            self.begin()
            self.replica.num_open -= 1
            self._is_open = False


class ReplicaTable:
    """All replicas of a model.

        order = table.order(digests, len(prompt_ids))      # the best first
        ticket = table.send(order[0], digests, len(prompt_ids))

    Args:
        sample: Function that samples a sequence like `random.sample`; replaced in tests.
    """

    def __init__(
        self,
        block_size: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sample: Callable[[Sequence[KnownReplica], int], list[KnownReplica]] = random.sample,
    ) -> None:
        self.replicas: dict[str, KnownReplica] = {}
        self._block_size = block_size
        self._clock = clock
        self._sample = sample

    def update(self, report: Report) -> None:
        """Apply a report; the first report of a replica adds it."""
        known = self.replicas.get(report.replica)
        if known is None:
            known = self.replicas[report.replica] = KnownReplica(report.replica, self._clock)
        known.update(report)

    def drop(self, name: str) -> None:
        """Remove a replica that is gone."""
        self.replicas.pop(name, None)

    def order(
        self,
        digests: Sequence[bytes],
        num_tokens: int,
        adapter: str | None = None,
        *,
        without: Collection[str] = (),
    ) -> list[str]:
        """Return the replicas that a prompt may go to, best first.

        Compares the replica with most of the prompt's blocks and two others at random. The cost is what must
        be computed until the prompt's first token: the replica's load, and the part of the prompt that it
        lacks. Two random choices are nearly as good as all (Mitzenmacher, The Power of Two Choices, 2001),
        and they keep several ingresses from all picking the replica that was least loaded a moment ago.
        """
        able = [
            each
            for each in self.replicas.values()
            if each.name not in without
            and each.num_missed < 2
            and (adapter is None or adapter in each.adapters)
        ]
        if not able:
            return []
        held = {each.name: each.num_held(digests) for each in able}
        able = self._sample(able, len(able))  # shuffled, so that older replicas do not come first
        best = max(able, key=lambda each: held[each.name])
        others = [each for each in able if each is not best]
        compared = [best, *others[:2]]
        size = self._block_size

        def cost(replica: KnownReplica) -> int:
            return replica.load + max(num_tokens - held[replica.name] * size, 1)

        return [each.name for each in (*sorted(compared, key=cost), *sorted(others[2:], key=cost))]

    def send(self, name: str, digests: Sequence[bytes], num_tokens: int) -> Ticket:
        """Record that a prompt goes to a replica."""
        replica = self.replicas[name]
        num_new = max(num_tokens - replica.num_held(digests) * self._block_size, 1)
        replica.expect(digests)
        return Ticket(replica, num_new)
