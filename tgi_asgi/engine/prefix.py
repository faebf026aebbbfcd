"""Keys of the prefix cache: a chained 128-bit hash per full block of tokens.

A key names a block's tokens and everything before them, so equal keys mean equal KV contents. Called by the
scheduler; knows nothing of blocks.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

_DIGEST_SIZE = 16


def root_digest(adapter: str | None, cache_salt: str | None) -> bytes:
    """Return the parent of a first block: what beside the tokens decides its contents, or who may share."""
    return blake2b(repr((adapter, cache_salt)).encode(), digest_size=_DIGEST_SIZE).digest()


class HashChain:
    """The digests of one sequence's full blocks, computed as far as they are asked for, each once.

    About 60 ns a token (`bench.scheduler`): 16 tokens a block are one blake2b of 80 bytes.
    """

    __slots__ = ("_block_size", "_digests", "_root")

    def __init__(self, root: bytes, block_size: int) -> None:
        self._root = root
        self._block_size = block_size
        self._digests: list[bytes] = []

    def digest(self, index: int, token_ids: Sequence[int]) -> bytes:
        """Return the digest of full block `index` of `token_ids`, which may only have grown since."""
        digests = self._digests
        size = self._block_size
        while len(digests) <= index:
            parent = digests[-1] if digests else self._root
            start = len(digests) * size
            tokens = array("I", token_ids[start : start + size])
            assert len(tokens) == size, "the block is not full"
            if sys.byteorder == "big":
                tokens.byteswap()
            digests.append(blake2b(parent + tokens.tobytes(), digest_size=_DIGEST_SIZE).digest())
        return digests[index]

    def fork(self, num_blocks: int, token_ids: Sequence[int]) -> HashChain:
        """Return a chain that shares the first `num_blocks` digests."""
        chain = HashChain(self._root, self._block_size)
        if num_blocks:
            self.digest(num_blocks - 1, token_ids)
            chain._digests = self._digests[:num_blocks]
        return chain
