"""The prefix cache's journal reports exactly the blocks that a pool can find."""

from __future__ import annotations

import random

from tgi_asgi.engine.blocks import BlockPool
from tgi_asgi.engine.journal import BlockJournal


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_a_reader_of_all_changes_knows_what_can_be_found() -> None:
    rng = random.Random(5)
    pool, journal = BlockPool(16, num_eager=6), BlockJournal()
    pool.journal = journal
    known: set[bytes] = set()
    seen = 0
    used: list[int] = []
    for number in range(2000):
        if used and (rng.random() < 0.5 or not pool.num_free):
            pool.release([used.pop(rng.randrange(len(used)))])
        else:
            block = pool.allocate()
            used.append(block)
            pool.register(block, digest(rng.randrange(40)))
        if number % 500 == 250:
            pool.forget(used[:1])
        if number == 1200:
            pool.reset()
        if rng.random() < 0.3:
            changes = journal.since(seen)
            assert changes is not None
            known = {each for each in known if changes.get(each, True)} | {
                each for each, is_found in changes.items() if is_found
            }
            seen = journal.end
            assert known == set(pool.known)


def test_a_reader_that_missed_changes_is_told_so() -> None:
    journal = BlockJournal(max_changes=3)
    for number in range(5):
        journal.found(digest(number))
    assert journal.since(1) is None
    assert journal.since(2) == {digest(2): True, digest(3): True, digest(4): True}
    assert journal.since(5) == {}
    assert journal.since(6) is None  # from an earlier run
