"""How a step's prompt tokens are shared while prompts are in prefill, and which new prompts may go first.

Tenants get equal parts; what one leaves goes to the others. Within a tenant, the most urgent prompt goes
first. If it is long, up to half of the tenant's part goes to much shorter prompts behind it:

    budget    tenant a                                  tenant b
              at most half: shorter  | the first one
              c c d d d              a a a a a a a      e e e e e e e e e e e e

A short prompt delays a long one by no more than its own computation, and the long one keeps half of its pace.
A prompt that overtakes is at most a quarter as long as what is left of those that it overtakes, unless it can
be computed at once. The half-computed prompts of a tenant, which hold blocks, thus stay few: those behind the
first one need a third of its blocks together. Only more urgent prompts add to them.

Called only by the scheduler; knows neither torch nor asyncio.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

from tgi_asgi.engine.allowance import Allowance
from tgi_asgi.engine.running_adapters import RunningAdapters
from tgi_asgi.engine.sequence import Sequence, Stage
from tgi_asgi.engine.tables import BlockTables
from tgi_asgi.engine.waiting import WaitingQueue

_OVERTAKING_DIVISOR = 2  # divisor of a tenant's part: what prompts that overtake may use of it
_MUCH_SHORTER = 4  # divisor of what is left of a prompt: the length up to which others may overtake it
_MAX_LOOKUPS = 8  # in the prefix cache, per step, to find prompts that are short once their prefix is shared
_MAX_STALE = 1000  # claims to remember besides those of a step

_urgency = attrgetter("urgency")


class Claim(NamedTuple):
    """A claim to a part of each step's prompt tokens."""

    tenant: str | None
    overtakes: bool  # whether it is that of the shorter prompts, or that of the first one


class ClaimHistory:
    """When claims had their last turns: a step may have fewer blocks of tokens than there are claims."""

    __slots__ = ("_last_turns", "_num_turns")

    def __init__(self) -> None:
        self._last_turns: dict[Claim, int] = {}  # by claim: the number of its last turn, longest ago first
        self._num_turns = 0

    def choose(self, claims: list[Claim], count: int) -> list[Claim]:
        """Return the `count` claims whose last turns are longest ago, and note that they have one now.

        Claims that are chosen together keep their order among themselves. A step may therefore choose again
        from those that it has chosen, for example with a smaller count: the same ones come first.
        """
        last = self._last_turns
        chosen = sorted(claims, key=lambda claim: last.get(claim, -1))[:count]
        for claim in chosen:
            last.pop(claim, None)
            last[claim] = self._num_turns = self._num_turns + 1
        while len(last) > len(chosen) + _MAX_STALE:
            del last[next(iter(last))]
        return chosen


class PromptTurns:
    """The turns of the prompts in one step: first those that start ahead of others, then those in prefill.

    Args:
        allowance: The step's prompt tokens.
        prefilling: The sequences in prefill, most urgent first.
    """

    __slots__ = (
        "_adapters", "_allowance", "_continuing", "_history", "_lines", "_lookups_left", "_next",
        "_prefilling", "_shares", "_tables", "_waiting",
    )  # fmt: skip

    def __init__(
        self,
        allowance: Allowance,
        prefilling: list[Sequence],
        waiting: WaitingQueue,
        tables: BlockTables,
        adapters: RunningAdapters,
        history: ClaimHistory,
    ) -> None:
        self._allowance, self._history = allowance, history
        self._waiting, self._tables, self._adapters = waiting, tables, adapters
        self._lookups_left = _MAX_LOOKUPS
        self._lines: dict[str | None, list[Sequence]] = {}  # by tenant: who may overtake, most urgent last
        self._next: dict[str | None, Sequence | None] = {}  # by tenant: the next of its line
        self._prefilling: dict[str | None, list[Sequence]] = {}  # by tenant, most urgent first
        for sequence in prefilling:
            self._prefilling.setdefault(sequence.tenant, []).append(sequence)
        self._shares = self._divide()
        self._continuing = self._in_turn(prefilling)

    def _in_turn(self, prefilling: list[Sequence]) -> list[tuple[Claim | None, Sequence]]:
        """Return the sequences in prefill in the order of their turns, each with its claim, if it has one.

        The longest of those with a claim is last, because it can take what others leave.
        """
        with_claim: list[tuple[Claim, Sequence]] = []
        others: list[tuple[None, Sequence]] = []
        for sequence in prefilling:
            first = self._prefilling[sequence.tenant][0]
            is_first = sequence is first
            if is_first or (_is_much_shorter(sequence, first) and _may_overtake(sequence, first)):
                with_claim.append((Claim(sequence.tenant, overtakes=not is_first), sequence))
            else:
                others.append((None, sequence))
        with_claim.sort(key=lambda turn: (turn[0] not in self._shares, turn[1].num_left))
        return [*with_claim, *others]

    def _divide(self) -> dict[Claim, int]:
        """Return how many tokens each claim has: at least a block, or none if it is not its turn."""
        size, waiting, left = self._tables.block_size, self._waiting.tenants, self._allowance.num_left
        claims = [Claim(tenant, False) for tenant in dict.fromkeys([*self._prefilling, *waiting])]
        for tenant, prefilling in self._prefilling.items():
            if len(prefilling) > 1 or tenant in waiting:
                claims.append(Claim(tenant, True))
        claims = self._history.choose(claims, max(left // size, 1))
        part = left // len({claim.tenant for claim in claims})
        shares: dict[Claim, int] = {}
        for claim in sorted(claims, key=lambda claim: not claim.overtakes):
            other = Claim(claim.tenant, not claim.overtakes)
            share = part - shares.get(other, 0)
            if claim.overtakes and other in claims:
                share //= _OVERTAKING_DIVISOR
            shares[claim] = max(share - share % size, size)
        return shares

    def candidate(self, head: Sequence) -> Sequence | None:
        """Return a tenant's next waiting sequence that may start before its prompts in prefill go on.

        Args:
            head: The tenant's most urgent waiting sequence.
        """
        claim = self._claim_of_new(head)
        if self._limit(claim) < self._tables.block_size:
            return None
        if not claim.overtakes:
            return head
        found = self._next.get(head.tenant)
        if found is None or found.stage is not Stage.WAITING or not self._adapters.may_run(found):
            found = self._next[head.tenant] = self._next_overtaking(head.tenant)
        return found

    def _next_overtaking(self, tenant: str | None) -> Sequence | None:
        """Return the most urgent waiting sequence that may overtake the tenant's prompts in prefill."""
        first, longest = self._prefilling[tenant][0], self._longest_to_overtake(tenant)
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = self._waiting.candidates(tenant, longest, _MAX_LOOKUPS)[::-1]
        while line:
            sequence = line.pop()
            may_run = _may_overtake(sequence, first) and self._adapters.may_run(sequence)
            if not may_run or self._tables.shares_next(sequence, first):
                continue
            if self._num_to_compute(sequence, longest) <= longest:
                return sequence
        return None

    def _longest_to_overtake(self, tenant: str | None) -> int:
        """Return how many tokens a prompt may compute that overtakes the tenant's prompts in prefill.

        It may be cut, and thus hold its blocks for a while, only if it is much shorter than all of these.
        """
        prefilling = self._prefilling[tenant]
        at_once = min(self._shares[Claim(tenant, True)], prefilling[0].num_left // _MUCH_SHORTER)
        return max(at_once, min(each.num_left for each in prefilling) // _MUCH_SHORTER)

    def _claim_of_new(self, sequence: Sequence) -> Claim:
        prefilling = self._prefilling.get(sequence.tenant)
        overtakes = prefilling is not None and prefilling[0].urgency < sequence.urgency
        return Claim(sequence.tenant, overtakes)

    def _limit(self, claim: Claim) -> int:
        """Return how many tokens a prompt that starts may use: if it overtakes, what its claim has.

        Otherwise, it is its tenant's most urgent prompt and may use all but what other tenants have.
        """
        if claim.overtakes:
            return min(self._shares.get(claim, 0), self._allowance.num_left)
        shares = self._shares.items()
        owed = sum(share for other, share in shares if other.tenant != claim.tenant)
        return self._allowance.num_left - owed

    def limit(self, sequence: Sequence) -> int:
        """Return how many tokens the sequence that `candidate` returned may compute; below a block: none."""
        claim = self._claim_of_new(sequence)
        limit = self._limit(claim)
        if self._num_to_compute(sequence, limit) > limit and self._allowance.reduce():
            self._shares = self._divide()
            limit = self._limit(claim)
        return limit

    def _num_to_compute(self, sequence: Sequence, enough: int) -> int:
        """Return how many tokens a waiting sequence computes; looks more than `enough` up in the cache."""
        num_left = sequence.num_left
        if num_left > enough and self._lookups_left:
            self._lookups_left -= 1
            num_left = self._tables.num_to_compute(sequence)
        return num_left

    def start(self, sequence: Sequence, count: int) -> None:
        """Note that a sequence has started with `count` tokens."""
        self._spend(sequence, self._claim_of_new(sequence), count)
        if sequence.num_left:
            insort(self._prefilling.setdefault(sequence.tenant, []), sequence, key=_urgency)

    def go_on(self, plan_chunk: Callable[[Sequence, int], int]) -> None:
        """Give the sequences that were in prefill before the step their turns.

        Args:
            plan_chunk: Plans at most that many tokens of a sequence, and returns how many.
        """
        for index, (claim, sequence) in enumerate(self._continuing):
            later = {each for each, _ in self._continuing[index + 1 :] if each not in (None, claim)}
            limit = self._left_before(later)
            if sequence.num_left > limit and self._allowance.reduce():
                self._shares = self._divide()
                limit = self._left_before(later)
            if limit > 0:
                self._spend(sequence, claim, plan_chunk(sequence, limit))

    def _left_before(self, later: set[Claim]) -> int:
        """Return how many tokens are left if those of later claims are kept for them."""
        return self._allowance.num_left - sum(self._shares.get(claim, 0) for claim in later)

    def _spend(self, sequence: Sequence, claim: Claim | None, count: int) -> None:
        self._allowance.spend(sequence, count)
        if claim is not None and claim in self._shares:
            self._shares[claim] = max(self._shares[claim] - count, 0)


def _is_much_shorter(sequence: Sequence, first: Sequence) -> bool:
    return sequence.num_left <= first.num_left // _MUCH_SHORTER


def _may_overtake(sequence: Sequence, first: Sequence) -> bool:
    """Return whether a sequence may overtake the first one if it is short: not if its priority is lower."""
    return sequence.request.priority <= first.request.priority
