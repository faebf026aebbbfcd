"""Keys of the prefix cache: a chained 128-bit hash per full block of tokens.

A key identifies a block's tokens and everything before them, so equal keys mean equal KV contents. Called by
the scheduler; knows nothing of blocks.
"""

from __future__ import annotations

import copy
import struct
import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from tgi_asgi.types import ImageInput

_DIGEST_SIZE = 16
_PLACE = struct.Struct("<qQ")  # an image's start, relative to the block's first token, and its length


def root_digest(adapter: str | None, cache_salt: str | None) -> bytes:
    """Return the parent of a first block: what its contents or its sharing depend on besides tokens."""
    return blake2b(repr((adapter, cache_salt)).encode(), digest_size=_DIGEST_SIZE).digest()


class HashChain:
    """The digests of one sequence's full blocks, each computed once, when it is first asked for.

    Takes about 60 ns per token (`bench.scheduler`): a block of 16 tokens is one blake2b of 80 bytes. All
    images have the same placeholder tokens, so the digest of a block that contains some of them also covers
    the image's digest and position:

        tokens    a b I I | I I I c        I: of an image of five tokens that begins at 2
        hashed    parent, tokens, (2, 5, image) | parent, tokens, (-2, 5, image)

    An image that every token sees changes even what precedes it, so the parent of the first block covers the
    digests of all of these.
    """

    __slots__ = ("_block_size", "_digests", "_images", "_root")

    def __init__(self, root: bytes, block_size: int, images: Sequence[ImageInput] = ()) -> None:
        self._root = _with_images(root, images)
        self._block_size = block_size
        self._images = images
        self._digests: list[bytes] = []

    def digest(self, index: int, token_ids: Sequence[int]) -> bytes:
        """Return the digest of full block `index` of `token_ids`, which may only have grown between calls."""
        if index >= len(self._digests):
            self._extend(index, token_ids)
        return self._digests[index]

    def _extend(self, index: int, token_ids: Sequence[int]) -> None:
        """Compute the digests up to block `index`."""
        digests, size = self._digests, self._block_size
        first = len(digests)
        tokens = array("I", token_ids[first * size : (index + 1) * size])
        assert len(tokens) == (index + 1 - first) * size, "the block is not full"
        if sys.byteorder == "big":
            tokens.byteswap()
        data, block_bytes = tokens.tobytes(), size * tokens.itemsize
        parent = digests[-1] if digests else self._root
        for block in range(first, index + 1):
            at = (block - first) * block_bytes
            content = parent + data[at : at + block_bytes]
            if self._images:
                content += self._seen(block * size)
            parent = blake2b(content, digest_size=_DIGEST_SIZE).digest()
            digests.append(parent)

    def digests(self, start: int, stop: int, token_ids: Sequence[int]) -> list[bytes]:
        """Return the digests of full blocks [start, stop) of `token_ids`, as `digest`."""
        if stop > start:
            self.digest(stop - 1, token_ids)
        return self._digests[start:stop]

    def _seen(self, start: int) -> bytes:
        """Return the bytes that identify the images with a token in the block that begins at `start`."""
        end = start + self._block_size
        return b"".join(
            _PLACE.pack(image.start - start, image.num_tokens) + image.digest
            for image in self._images
            if image.start < end and image.start + image.num_tokens > start
        )

    def fork(self, num_blocks: int, token_ids: Sequence[int]) -> HashChain:
        """Return a chain that shares the first `num_blocks` digests."""
        chain = copy.copy(self)
        if num_blocks:
            self.digest(num_blocks - 1, token_ids)
        chain._digests = self._digests[:num_blocks]
        return chain


def _with_images(root: bytes, images: Sequence[ImageInput]) -> bytes:
    """Return the parent of the first block of a sequence that has these images."""
    seen = b"".join(image.digest for image in images if image.is_seen_by_all)
    return blake2b(root + seen, digest_size=_DIGEST_SIZE).digest() if seen else root
