"""Which sequence has which blocks: new ones, cached prefixes, forks, growth, and giving all of it back.

Called by the scheduler, which decides who gets them; knows neither torch nor asyncio.
"""

from __future__ import annotations

from collections.abc import Mapping

from tgi_asgi.engine.blocks import BlockPool
from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.engine.stats import EngineStats


class BlockTables:
    """Fill and empty the block tables of sequences from one pool.

    A table covers all tokens of a prompt from the start; when a sequence decodes it grows block by block.
    `reserve` is how many free blocks a new sequence must leave to those that run already.

    Args:
        shares_prompts_alone: blocks with tokens that were drawn are neither found nor left to be found: the
            same tokens of a prompt would fill them otherwise.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        *,
        prefix_cache: bool,
        can_fork: bool = True,
        shares_prompts_alone: bool = False,
        stats: EngineStats,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self._prefix_cache, self._can_fork = prefix_cache, can_fork
        self._shares_prompts_alone = shares_prompts_alone
        self._stats = stats

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def start(self, sequence: Sequence, reserve: int) -> bool:
        """Give a sequence blocks for all its tokens, from the cache or its leader as far as they reach."""
        leader = sequence.leader
        is_new = sequence.num_output == 0
        if leader is not None and is_new and self._prefix_cache:
            num_prompt_blocks = sequence.prompt_len // self.block_size
            sequence.chain = leader.chain.fork(num_prompt_blocks, sequence.token_ids)
        if leader is not None and is_new and leader.has_computed_prompt and self._can_fork:
            return self._fork(sequence, leader, reserve)
        return self._take(sequence, reserve)

    def _take(self, sequence: Sequence, reserve: int) -> bool:
        """Take the longest cached prefix, and new blocks for the rest."""
        pool = self.pool
        cached = self._find_prefix(sequence) if self._may_look_up(sequence) else []
        num_new = self.blocks_for(len(sequence.token_ids)) - len(cached)
        if pool.num_free - num_new - sum(map(pool.is_free, cached)) < reserve:
            return False
        for block in cached:
            pool.take(block)
        sequence.table = cached + [pool.allocate() for _ in range(num_new)]
        sequence.num_registered = len(cached)
        sequence.num_computed = sequence.num_taken = len(cached) * self.block_size
        return True

    def _may_look_up(self, sequence: Sequence) -> bool:
        return self._prefix_cache and sequence.request.is_prefix_cached and not sequence.needs_all

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Return the blocks of the longest cached prefix; at least one token is left to compute."""
        blocks: list[int] = []
        tokens = sequence.token_ids
        num_blocks = self._num_shared(sequence, len(tokens) - 1)
        for index in range(num_blocks):
            block = self.pool.find(sequence.chain.digest(index, tokens))
            if block is None:
                break
            blocks.append(block)
        for index in range(len(blocks), num_blocks):  # the pool learns what it should have kept
            if not self.pool.miss(sequence.chain.digest(index, tokens)):
                break
        return blocks

    def _num_shared(self, sequence: Sequence, num_tokens: int) -> int:
        """Return how many blocks the first `num_tokens` tokens fill that others may share."""
        if self._shares_prompts_alone:
            num_tokens = min(num_tokens, sequence.prompt_len)
        return num_tokens // self.block_size

    def _fork(self, sequence: Sequence, leader: Sequence, reserve: int) -> bool:
        """Share the leader's full blocks before the last prompt token, and copy the partial one.

        That token is computed again, so that each choice draws its own first token.
        """
        if self.pool.num_free - 1 < reserve:
            return False
        start = sequence.prompt_len - 1
        num_shared, num_partial = divmod(start, self.block_size)
        sequence.table = leader.table[:num_shared]
        for block in sequence.table:
            self.pool.share(block)
        sequence.table.append(self.pool.allocate())
        if num_partial:
            sequence.copy_source = leader.table[num_shared]
            self.pool.share(sequence.copy_source)
        sequence.num_computed = sequence.num_taken = start
        sequence.num_registered = num_shared
        sequence.num_cached = 0
        return True

    def grow(self, sequence: Sequence) -> None:
        """Add a block; needs a free one."""
        sequence.table.append(self.pool.allocate())

    def register(self, sequence: Sequence, num_tokens: int) -> None:
        """Make what the first `num_tokens` tokens fill findable: the steps planned so far write it."""
        num_full = self._num_shared(sequence, num_tokens)
        if num_full <= sequence.num_registered:
            return
        if self._prefix_cache:
            for index in range(sequence.num_registered, num_full):
                digest = sequence.chain.digest(index, sequence.token_ids)
                self.pool.register(sequence.table[index], digest)
        sequence.num_registered = num_full

    def settle(self, sequence: Sequence, num_computed: int) -> None:
        """Learn that the first `num_computed` tokens are in the cache for good."""
        if sequence.copy_source is not None:
            self._release_copy(sequence)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_taken
            if self._may_look_up(sequence):
                self._stats.prefix_query_tokens += sequence.prompt_len
                self._stats.prefix_hit_tokens += sequence.num_taken
        self.register(sequence, num_computed)

    def reads(self, sequence: Sequence, lost: Mapping[int, int]) -> bool:
        """Tell whether a sequence was to read of others what is lost: blocks, and from which position on."""
        shared = sequence.table[: sequence.num_taken // self.block_size]
        if not lost.keys().isdisjoint(shared):
            return True
        source = sequence.copy_source
        return source is not None and lost.get(source, sequence.num_taken) < sequence.num_taken

    def give_back(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Release all blocks of a sequence; with `forget` none of them can be found any more."""
        if forget:
            self.pool.forget(sequence.table)
        self._release_copy(sequence)
        self.pool.release(sequence.table)

    def _release_copy(self, sequence: Sequence) -> None:
        if sequence.copy_source is not None:
            self.pool.release([sequence.copy_source])
            sequence.copy_source = None
