"""The block tables of sequences: new blocks, cached prefixes, forks, growth, and releasing all of it.

A sequence has one block table per group of layers, indexed by position, so a block of tokens takes one block
in each group. In a group with a window, a sequence holds the blocks that the window covers, and a prompt also
those that steps in flight fill. Called by the scheduler, which decides who gets blocks; knows neither torch
nor asyncio.

    window 5, blocks of 4 tokens, a prompt of 19 in chunks of 8
                                    all positions   window
    0..7 planned                    0 1 2 3 4       0 1
    0..7 computed, 8..15 planned    0 1 2 3 4       . 1 2 3       position 8 sees 4 and later
    8..15 computed, 16..18 planned  0 1 2 3 4       . . . 3 4
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tgi_asgi.engine.blocks import BlockPool
from tgi_asgi.engine.hits import cache_version, find_hit, group_key, note_misses
from tgi_asgi.engine.sequence import Hit, Sequence
from tgi_asgi.engine.states import KeptStates
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.runner.groups import BlockNeeds

_NO_BLOCK = -1  # entry before the window of the first token that the sequence computes


class BlockTables:
    """The block tables of sequences, filled from one pool.

    When a sequence starts, its tables without a window cover all tokens of its prompt, and those with a
    window cover the planned tokens. While it decodes, all tables grow block by block.

    Args:
        needs: Block needs of each group, in the order of a sequence's tables.
        shares_only_prompts: Whether blocks with sampled tokens are neither looked up nor registered, because
            the same tokens as part of a prompt would fill them with other bits.
        num_kept_states: As in `RunnerTraits`.

    Attributes:
        states: The kept states; None if the model has none or none are kept.
    """

    def __init__(
        self,
        pool: BlockPool,
        needs: BlockNeeds,
        *,
        prefix_cache: bool,
        num_kept_states: int | None = None,
        shares_only_prompts: bool = False,
        stats: EngineStats,
    ) -> None:
        self.pool = pool
        self.needs = needs
        self.block_size = needs.block_size
        self.num_groups = len(needs.windows)
        self._groups = range(self.num_groups)
        self._windowed = [group for group in self._groups if needs.windows[group] is not None]
        self._prefix_cache, self._can_fork = prefix_cache, num_kept_states != 0
        self._shares_only_prompts = shares_only_prompts
        self._stats = stats
        self.states: KeptStates | None = None
        if num_kept_states:
            keeps_answers = prefix_cache and not shares_only_prompts
            self.states = KeptStates(num_kept_states, pool, needs.block_size, keeps_answers=keeps_answers)
            pool.dependents = self.states

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks of a group hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def num_held(self, sequence: Sequence) -> int:
        """Return how many blocks a sequence holds."""
        return sum(map(len, sequence.tables)) - sum(sequence.num_freed)

    def start(self, sequence: Sequence, running: Collection[Sequence]) -> bool:
        """Give a sequence its first blocks, shared with the cache or its leader as far as possible.

        Returns False if the running sequences would not have enough blocks left.
        """
        spare = self._num_spare(running)
        if spare < self.num_groups:
            return False
        leader = sequence.leader
        is_new = sequence.num_output == 0
        if leader is not None and is_new and self._prefix_cache:
            num_prompt_blocks = sequence.prompt_len // self.block_size
            sequence.chain = leader.chain.fork(num_prompt_blocks, sequence.token_ids)
        if leader is not None and is_new and self._may_fork(sequence, leader):
            self._fork(sequence, leader)
            return True
        return self._take(sequence, spare)

    def may_start(self, running: Collection[Sequence]) -> bool:
        """Return whether the running sequences leave as many free blocks as any sequence needs at least.

        The last token is never taken from the cache, so that is one block in each group.
        """
        return self._num_spare(running) >= self.num_groups

    def _num_spare(self, running: Collection[Sequence]) -> int:
        """Return how many free blocks are left without those that the running sequences need soon.

        They need the next one in each group, and prompts all that they still lack. Otherwise several could
        each hold a part of what one needs, and if none can be cut there, as within an image, wait for each
        other forever.
        """
        num_next = len(running) * self.num_groups
        num_lacking = sum(self._num_lacking(each) for each in running if each.is_prefilling)
        return self.pool.num_free - num_next - num_lacking

    def _num_lacking(self, sequence: Sequence) -> int:
        """Return how many blocks a running sequence lacks for its known tokens."""
        num_tokens = len(sequence.token_ids)
        num_lacking = 0
        for group in self._windowed:
            num_entries = len(sequence.tables[group])
            num_left = self.blocks_for(num_tokens) - num_entries
            num_held = num_entries - sequence.num_freed[group]
            num_lacking += max(min(num_left, self.needs.max_held(group, num_tokens) - num_held), 0)
        return num_lacking

    def _take(self, sequence: Sequence, spare: int) -> bool:
        """Take the longest cached prefix, and new blocks for the tokens after it, if `spare` are enough."""
        pool = self.pool
        num_tokens = len(sequence.token_ids)
        num_blocks, num_shared = self.blocks_for(num_tokens), self._num_shared(sequence, num_tokens - 1)
        may_look_up = self._may_look_up(sequence)
        hit = self._find_hit(sequence) if may_look_up else Hit.none(self.num_groups)
        num_new = self.needs.total_for(num_tokens, keeps_all=sequence.needs_all) - sum(map(len, hit.blocks))
        num_revived = sum(map(pool.count_free, hit.blocks))
        if num_new + num_revived > spare:
            return False
        if may_look_up:
            note_misses(pool, self.needs, sequence, num_shared, hit)
        for blocks in hit.blocks:
            for block in blocks:
                pool.take(block)
        sequence.num_freed = [hit.num_blocks - len(blocks) for blocks in hit.blocks]
        sequence.tables = tuple(
            [_NO_BLOCK] * sequence.num_freed[group] + blocks for group, blocks in enumerate(hit.blocks)
        )
        for group, table in enumerate(sequence.tables):
            if self.needs.windows[group] is None or sequence.needs_all:
                table.extend(pool.allocate() for _ in range(num_blocks - len(table)))
        sequence.num_registered = hit.num_blocks
        sequence.num_computed = sequence.num_reused = hit.num_blocks * self.block_size
        sequence.num_settled = sequence.num_computed
        if self.states is not None and self._prefix_cache:
            ends = sorted({hit.num_found, num_shared} - {0})
            sequence.recurrent.keep_at = tuple(end * self.block_size for end in ends if end > hit.num_blocks)
            if hit.state is not None:
                self.states.resume(sequence, hit.state)
        sequence.hit = None
        return True

    def _may_look_up(self, sequence: Sequence) -> bool:
        return self._prefix_cache and not sequence.needs_all

    def _find_hit(self, sequence: Sequence) -> Hit:
        """Return what a waiting sequence finds in the cache; looks again only once the cache has changed.

        A step may ask several times, and a look takes 7 ns per token: 0.9 ms for 128,000 tokens.
        """
        hit = sequence.hit
        if hit is None or hit.version != cache_version(self.pool, self.states):
            num_shared = self._num_shared(sequence, len(sequence.token_ids) - 1)
            hit = sequence.hit = find_hit(self.pool, self.needs, sequence, num_shared, self.states)
        return hit

    def num_to_compute(self, sequence: Sequence) -> int:
        """Return how many of a waiting sequence's known tokens are not in the prefix cache."""
        num_tokens = len(sequence.token_ids)
        if not self._may_look_up(sequence):
            return num_tokens
        return num_tokens - self._find_hit(sequence).num_blocks * self.block_size

    def recent_num_to_compute(self, sequence: Sequence) -> int:
        """Return `num_to_compute` of a waiting sequence as of the last time that it was looked up.

        It may be outdated, which is enough to size a step: while a long prompt waits for blocks, every step
        asks.
        """
        hit = sequence.hit
        if hit is None:
            return self.num_to_compute(sequence)
        return len(sequence.token_ids) - hit.num_blocks * self.block_size

    def shares_next(self, sequence: Sequence, other: Sequence) -> bool:
        """Return whether a waiting sequence has the same tokens in the block that another computes next.

        Once that is computed, the waiting one most likely finds it in the prefix cache.
        """
        start = other.num_computed - other.num_computed % self.block_size
        end = start + self.block_size
        if end > len(sequence.token_ids) or not self._may_look_up(sequence):
            return False
        return sequence.token_ids[start:end] == other.token_ids[start:end]

    def _num_shared(self, sequence: Sequence, num_tokens: int) -> int:
        """Return how many blocks that others may share are filled by the first `num_tokens` tokens."""
        if self._shares_only_prompts:
            num_tokens = min(num_tokens, sequence.prompt_len)
        return num_tokens // self.block_size

    def _may_fork(self, sequence: Sequence, leader: Sequence) -> bool:
        """Return whether the leader holds everything that the prompt's last token reads."""
        if not self._can_fork or not leader.has_computed_prompt:
            return False
        if self.states is not None and leader.recurrent.for_choices is None:
            return False
        last = sequence.prompt_len - 1
        return all(leader.num_freed[group] <= self.needs.first_read(group, last) for group in self._groups)

    def _fork(self, sequence: Sequence, leader: Sequence) -> None:
        """Share the leader's full blocks before the last prompt token, and copy the partial one.

        That token is computed again, so that each choice samples its own first token.
        """
        start = sequence.prompt_len - 1
        num_shared, num_partial = divmod(start, self.block_size)
        sequence.num_freed = [self.needs.first_read(group, start) for group in self._groups]
        sequence.tables = tuple(
            [_NO_BLOCK] * first + table[first:num_shared]
            for first, table in zip(sequence.num_freed, leader.tables, strict=True)
        )
        for first, table in zip(sequence.num_freed, sequence.tables, strict=True):
            for block in table[first:]:
                self.pool.share(block)
            table.append(self.pool.allocate())
        if num_partial:
            sequence.copy_sources = [table[num_shared] for table in leader.tables]
            for block in sequence.copy_sources:
                self.pool.share(block)
        sequence.num_computed = sequence.num_reused = sequence.num_settled = start
        sequence.num_registered = num_shared
        sequence.num_cached = 0
        if self.states is not None:
            self.states.fork(sequence, leader)

    def grow(self, sequence: Sequence) -> None:
        """Add a block to each table; requires that many free blocks."""
        for table in sequence.tables:
            table.append(self.pool.allocate())

    def cover(self, sequence: Sequence, end: int, spare: int = 0) -> int:
        """Allocate blocks for a prompt in prefill up to position `end`, as far as blocks are free.

        All but the next block leave `spare` blocks free for others. Returns the position up to which every
        group has blocks.
        """
        if not self._windowed:
            return self.blocks_for(len(sequence.token_ids)) * self.block_size
        num_entries = len(sequence.tables[self._windowed[0]])  # in the table of each windowed group
        num_freed, needs = sequence.num_freed, self.needs
        max_entries = min(num_freed[group] + needs.max_held(group, end) for group in self._windowed)
        count = min(self.blocks_for(end), max_entries) - num_entries
        if count > 0:
            width, num_free = len(self._windowed), self.pool.num_free
            count = min(count, max((num_free - spare) // width, 1))
            if count * width <= num_free:
                for group in self._windowed:
                    sequence.tables[group].extend(self.pool.allocate() for _ in range(count))
                num_entries += count
        return num_entries * self.block_size

    def num_missing(self, sequence: Sequence) -> int:
        """Return how many blocks a prompt lacks for its next token, if no step in flight will free any."""
        if not self._windowed or sequence.num_settled < sequence.num_computed:
            return 0
        is_covered = sequence.num_computed < len(sequence.tables[self._windowed[0]]) * self.block_size
        return 0 if is_covered else len(self._windowed)

    def register(self, sequence: Sequence, num_tokens: int) -> None:
        """Make the blocks that `num_tokens` tokens fill findable; the steps planned so far write them."""
        num_full = self._num_shared(sequence, num_tokens)
        if num_full <= sequence.num_registered:
            return
        if self._prefix_cache:
            for index in range(sequence.num_registered, num_full):
                digest = sequence.chain.digest(index, sequence.token_ids)
                for group, table in enumerate(sequence.tables):
                    self.pool.register(table[index], group_key(digest, group))
        sequence.num_registered = num_full

    def settle(self, sequence: Sequence, num_computed: int) -> None:
        """Record that `num_computed` tokens are in the cache for good and no row begins before."""
        if sequence.copy_sources:
            self._release_copies(sequence)
        if self.states is not None:
            self.states.begin(sequence)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_reused
            if self._may_look_up(sequence):
                self._stats.prefix_query_tokens += sequence.prompt_len
                self._stats.prefix_hit_tokens += sequence.num_reused
        self.register(sequence, num_computed)
        sequence.num_settled = num_computed
        if self._windowed and not sequence.needs_all:
            self._free_before_window(sequence, num_computed)

    def _free_before_window(self, sequence: Sequence, position: int) -> None:
        """Release the blocks that no token from `position` on reads; steps in flight still use the ids."""
        for group in self._windowed:
            first, before = self.needs.first_read(group, position), sequence.num_freed[group]
            if first > before:
                self.pool.release(sequence.tables[group][before:first])
                sequence.num_freed[group] = first

    def reads(self, sequence: Sequence, lost: Mapping[int, int]) -> bool:
        """Return whether a sequence was to read shared contents that are lost.

        Args:
            lost: By block, the position from which its contents are lost.
        """
        num_shared = sequence.num_reused // self.block_size
        for table, first in zip(sequence.tables, sequence.num_freed, strict=True):
            if not lost.keys().isdisjoint(table[first:num_shared]):
                return True
        return any(
            lost.get(block, sequence.num_reused) < sequence.num_reused for block in sequence.copy_sources
        )

    def release(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Release all blocks of a sequence; with `forget`, none of them can be found any more."""
        held = [table[first:] for table, first in zip(sequence.tables, sequence.num_freed, strict=True)]
        self._release_copies(sequence)
        if self.states is not None:
            self.states.release(sequence)
        for blocks in held:
            if forget:
                self.pool.forget(blocks)
            self.pool.release(blocks)

    def _release_copies(self, sequence: Sequence) -> None:
        self.pool.release(sequence.copy_sources)
        sequence.copy_sources = []
