from __future__ import annotations

import pytest

from tgi_asgi.engine.prefix import HashChain, root_digest
from tgi_asgi.types import ImageInput

TOKENS = list(range(64))


def image(start: int, num_tokens: int, digest: bytes = b"a" * 32) -> ImageInput:
    return ImageInput(digest, start, num_tokens, payload=None)


def digests(
    tokens: list[int],
    adapter: str | None = None,
    salt: str | None = None,
    images: tuple[ImageInput, ...] = (),
) -> list[bytes]:
    chain = HashChain(root_digest(adapter, salt), 16, images)
    return [chain.digest(index, tokens) for index in range(len(tokens) // 16)]


def test_a_digest_has_128_bits_and_is_the_same_every_time() -> None:
    assert all(len(digest) == 16 for digest in digests(TOKENS))
    # Replicas compare digests, so they must not depend on the process or the machine.
    assert digests(TOKENS)[0].hex() == "7e5f7012f8730d3960e2d29633711529"


@pytest.mark.parametrize("changed", range(64))
def test_a_digest_names_its_tokens_and_all_before(changed: int) -> None:
    other = [*TOKENS[:changed], 99999, *TOKENS[changed + 1 :]]
    same = [a == b for a, b in zip(digests(TOKENS), digests(other), strict=True)]
    assert same == [index < changed // 16 for index in range(4)]


def test_adapters_and_salts_never_share() -> None:
    keys = [(None, None), ("a", None), (None, "a"), ("a", "a"), ("", None), (None, ""), ("a', 'b", None)]
    firsts = {digests(TOKENS, adapter, salt)[0] for adapter, salt in keys}
    assert len(firsts) == len(keys)


def test_a_fork_goes_on_from_what_it_shares() -> None:
    chain = HashChain(root_digest(None, None), 16)
    fork = chain.fork(2, TOKENS)
    branch = [*TOKENS[:32], *range(500, 532)]
    assert [fork.digest(index, branch) for index in range(4)] == digests(branch)
    assert [chain.digest(index, TOKENS) for index in range(4)] == digests(TOKENS)


def test_growing_text_keeps_its_digests() -> None:
    chain = HashChain(root_digest(None, None), 16)
    tokens = TOKENS[:20]
    first = chain.digest(0, tokens)
    tokens += TOKENS[20:]
    assert [first, chain.digest(1, tokens)] == digests(TOKENS)[:2]


@pytest.mark.parametrize(
    ("first", "num_tokens"), [(0, 1), (15, 1), (16, 1), (15, 2), (20, 4), (10, 40), (63, 1), (0, 64)]
)
def test_blocks_from_an_image_on_are_those_of_that_image_alone(first: int, num_tokens: int) -> None:
    ones = digests(TOKENS, images=(image(first, num_tokens),))
    others = digests(TOKENS, images=(image(first, num_tokens, b"b" * 32),))
    plain = digests(TOKENS)
    before = first // 16
    assert ones[:before] == others[:before] == plain[:before]
    for block in range(before, 4):
        assert len({ones[block], others[block], plain[block]}) == 3
    assert ones == digests(TOKENS, images=(image(first, num_tokens),))


def test_images_that_every_token_sees_change_what_precedes_them() -> None:
    def with_images(*names: bytes) -> list[bytes]:
        images = [ImageInput(name * 32, 40 + at, 1, None, True) for at, name in enumerate(names)]
        return digests(TOKENS, images=tuple(images))

    kinds = [(), (b"a",), (b"b",), (b"a", b"b"), (b"b", b"a")]
    assert [len({with_images(*names)[block] for names in kinds}) for block in range(4)] == [len(kinds)] * 4
    assert with_images(b"a", b"b") == with_images(b"a", b"b")


def test_images_side_by_side_are_told_apart_by_where_they_meet() -> None:
    tokens = [7] * 16
    a, b = b"a" * 32, b"b" * 32
    cuts = [(image(0, cut, a), image(cut, 16 - cut, b)) for cut in range(1, 16)]
    swapped = [(image(0, cut, b), image(cut, 16 - cut, a)) for cut in range(1, 16)]
    assert len({digests(tokens, images=images)[0] for images in cuts + swapped}) == 30


def test_an_image_that_begins_in_another_place_is_another() -> None:
    tokens = [7] * 32
    found = {digests(tokens, images=(image(start, 4),))[1] for start in range(29)}
    assert len(found) == 29


def test_a_fork_knows_the_images() -> None:
    images = (image(40, 8),)
    chain = HashChain(root_digest(None, None), 16, images)
    assert [chain.fork(1, TOKENS).digest(index, TOKENS) for index in range(4)] == digests(
        TOKENS, images=images
    )
