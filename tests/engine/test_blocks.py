from __future__ import annotations

import pytest

from tests.support.block_pool import check_pool
from tgi_asgi.engine.blocks import BlockPool


def digest(name: str) -> bytes:
    return name.encode().ljust(16)


def test_blocks_are_handed_out_once_until_released() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    assert sorted(blocks) == [0, 1, 2]
    assert (pool.num_free, pool.num_used) == (0, 3)
    pool.release(blocks)
    assert (pool.num_free, pool.num_used) == (3, 0)


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.share(block)
    pool.release([block])
    assert pool.num_holders(block) > 0
    pool.release([block])
    assert pool.num_holders(block) == 0
    check_pool(pool)


def test_contents_are_found_up_to_the_first_that_are_gone() -> None:
    pool = BlockPool(4)
    names = [digest(name) for name in "abcd"]
    blocks = [pool.allocate() for _ in names]
    for block, name in zip(blocks, names, strict=True):
        pool.register(block, name)
    assert pool.find_leading(names) == blocks
    pool.forget([blocks[2]])
    assert pool.find_leading(names) == blocks[:2]
    assert pool.find_leading([]) == []
    pool.release(blocks[1:])
    assert (pool.count_free(blocks), pool.count_free(blocks[:2]), pool.count_free([])) == (3, 1, 0)


def test_releasing_twice_is_noticed() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.release([block])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release([block])


def test_a_freed_block_is_found_by_its_contents_and_revived() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.register(block, digest("a"))
    pool.release([block])
    assert pool.find(digest("a")) == block
    pool.take(block)
    assert pool.num_used == 1
    check_pool(pool)


def test_cached_blocks_are_reused_last_and_the_longest_unused_first() -> None:
    pool = BlockPool(4)
    old, new, plain = pool.allocate(), pool.allocate(), pool.allocate()
    pool.register(old, digest("old"))
    pool.register(new, digest("new"))
    pool.release([old])
    pool.release([new])
    pool.release([plain])
    assert {pool.allocate(), pool.allocate()} == {plain, 3}
    assert pool.allocate() == old
    assert pool.find(digest("old")) is None
    assert pool.find(digest("new")) == new


def test_a_chain_is_evicted_from_its_end() -> None:
    pool = BlockPool(3)
    chain = [pool.allocate() for _ in range(3)]
    for index, block in enumerate(chain):
        pool.register(block, digest(str(index)))
    pool.release(chain)
    assert pool.allocate() == chain[-1]
    assert pool.find(digest("0")) == chain[0]


def test_a_reused_block_forgets_what_it_held() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    pool.register(block, digest("a"))
    pool.release([block])
    assert pool.allocate() == block
    assert pool.find(digest("a")) is None
    check_pool(pool)


def test_the_same_contents_twice_keep_their_first_block() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, digest("a"))
    pool.register(second, digest("a"))
    assert pool.find(digest("a")) == first
    check_pool(pool)


def test_forgotten_contents_are_not_found_and_the_block_stays_with_its_holder() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    pool.register(block, digest("a"))
    pool.forget([block])
    assert pool.find(digest("a")) is None
    assert pool.num_used == 1
    check_pool(pool)


def fill(pool: BlockPool, name: str) -> int:
    """Allocate a block, cache it under a name, and release it."""
    block = pool.allocate()
    pool.register(block, digest(name))
    pool.release([block])
    return block


def test_new_blocks_are_touched_only_as_far_as_that_pays() -> None:
    pool = BlockPool(100, num_eager=4)
    for index in range(50):
        fill(pool, str(index))
    assert pool.num_touched == 4
    assert pool.num_free == 100
    assert pool.find(digest("49")) is not None
    assert pool.find(digest("45")) is None
    check_pool(pool)


def test_blocks_that_are_needed_at_once_are_there() -> None:
    pool = BlockPool(10, num_eager=2)
    held = [pool.allocate() for _ in range(10)]
    assert sorted(held) == list(range(10))
    pool.release(held)
    check_pool(pool)
    for index in range(30):
        fill(pool, str(index))
    assert pool.num_touched == 10


def test_the_cache_grows_while_what_it_gave_up_is_wanted_again() -> None:
    """Six alternating conversations never hit in a cache for four, until the cache has grown to hold six."""
    pool = BlockPool(100, num_eager=4)
    hits = []
    for turn in range(40):
        name = digest(str(turn % 6))
        block = pool.find(name)
        hits.append(block is not None)
        if block is None:
            pool.miss(name)
            fill(pool, str(turn % 6))
        else:
            pool.take(block)
            pool.release([block])
        check_pool(pool)
    assert all(hits[-20:])
    assert pool.num_touched <= 8
    assert not pool.miss(digest("never seen"))


def test_the_cache_grows_from_what_it_has_touched_once_for_contents_that_it_gave_up() -> None:
    pool = BlockPool(20, num_eager=2)
    pool.release([pool.allocate() for _ in range(10)])
    for index in range(11):
        fill(pool, str(index))
    assert pool.num_touched == 10
    assert pool.miss(digest("0")) and not pool.miss(digest("0"))
    for index in range(20):
        fill(pool, f"new {index}")
    assert pool.num_touched == 11


def test_no_more_contents_are_remembered_than_there_are_blocks() -> None:
    pool = BlockPool(3, num_eager=1)
    for index in range(6):
        fill(pool, str(index))
    assert [pool.miss(digest(str(index))) for index in range(6)] == [False, False, True, True, True, False]
