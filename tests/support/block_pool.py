"""The invariants of a block pool."""

from __future__ import annotations

from tgi_asgi.engine.blocks import BlockPool


def check_pool(pool: BlockPool) -> None:
    """Assert that a pool's counts, lists and indices agree with each other."""
    used = sum(count > 0 for count in pool._references)
    assert used == pool.num_used
    assert used + pool.num_free == pool.num_blocks
    assert all(pool._references[block] == 0 for block in pool._free)
    assert not any(pool._references[pool.num_touched :])
    assert all(block < pool.num_touched for block in pool._free)
    assert not pool._evicted.keys() & pool._by_digest.keys()
    registered = {block: digest for block, digest in enumerate(pool._digests) if digest is not None}
    assert registered == {block: digest for digest, block in pool._by_digest.items()}
