from __future__ import annotations

import pytest

from tgi_asgi.engine.prefix import HashChain, root_digest

TOKENS = list(range(64))


def digests(tokens: list[int], adapter: str | None = None, salt: str | None = None) -> list[bytes]:
    chain = HashChain(root_digest(adapter, salt), 16)
    return [chain.digest(index, tokens) for index in range(len(tokens) // 16)]


def test_a_digest_has_128_bits_and_is_the_same_every_time() -> None:
    assert digests(TOKENS) == digests(TOKENS)
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
