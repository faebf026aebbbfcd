"""The drafter: what it finds, how many draft tokens pay off, and what it learns."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests.support.memory import resident_bytes
from tgi_asgi import ops
from tgi_asgi.system import return_freed_memory

FREE: dict[str, Any] = {"base": 1.0, "token": 0.0, "num_tokens": 1}


def drafter_of(tokens: list[int], shortest: int = 2, longest: int = 32) -> ops.Drafter:
    drafter = ops.Drafter(num_slots=2, shortest=shortest, longest=longest)
    drafter.start(0, np.array(tokens, np.int32))
    return drafter


def followers(tokens: list[int], shortest: int, longest: int) -> set[int]:
    """Return the tokens that follow the longest matches, by checking every position."""
    best, found = shortest, set[int]()
    for end in range(1, len(tokens)):
        size = 0
        while size < min(end, longest) and tokens[end - 1 - size] == tokens[-1 - size]:
            size += 1
        if size > best:
            best, found = size, set()
        if size == best:
            found.add(tokens[end])
    return found


@pytest.mark.parametrize("by_appending", [False, True])
@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 5), (2, 32), (3, 4)])
def test_the_first_draft_is_what_followed_a_longest_match(
    shortest: int, longest: int, by_appending: bool
) -> None:
    rng = random.Random(shortest * 10 + longest)
    for _ in range(60):
        vocab = rng.choice([2, 3, 20])
        tokens = [rng.randrange(vocab) for _ in range(rng.randrange(0, 32))]
        drafter = drafter_of([] if by_appending else tokens, shortest, longest)
        for token in tokens if by_appending else ():
            drafter.append(0, token)
        [drafts] = drafter.choose([(0, 1, ())], **FREE)
        expected = followers(tokens, shortest, longest)
        assert len(drafts) == bool(expected)
        assert expected.issuperset(drafts)


def test_a_match_that_reaches_the_end_goes_round() -> None:
    [drafts] = drafter_of([7, 8, 9, 7, 8, 9, 7, 8]).choose([(0, 7, ())], **FREE)
    assert drafts == [9, 7, 8, 9, 7, 8, 9]


def test_what_is_certain_comes_before_any_guess_and_alone() -> None:
    drafter = drafter_of([7, 8, 9, 7, 8])
    assert drafter.choose([(0, 5, (1, 2)), (1, 5, ())], **FREE) == [[1, 2], []]
    assert drafter.choose([(0, 1, (1, 2))], **FREE) == [[1]]


def test_no_draft_where_a_token_costs_what_it_brings() -> None:
    drafter = drafter_of([7, 8, 9] * 20)
    assert drafter.choose([(0, 8, ())], base=0.0, token=1.0, num_tokens=1) == [[]]
    assert drafter.choose([(0, 8, ())], base=1.0, token=1.0, num_tokens=64) == [[]]
    [few] = drafter.choose([(0, 8, ())], base=1.0, token=0.5, num_tokens=1)
    [many] = drafter.choose([(0, 8, ())], base=1.0, token=0.05, num_tokens=1)
    assert len(few) < len(many)


def test_guesses_that_are_not_sampled_teach_it_to_guess_less() -> None:
    cost: dict[str, Any] = {"base": 1.0, "token": 0.1, "num_tokens": 1}
    rng = random.Random(1)
    drafter = drafter_of([1, 2, 3, 4, 5, 6, 7, 8])
    before = []
    for _ in range(60):
        for token in (1, 2, rng.randrange(100, 200)):
            drafter.append(0, token)
        drafter.append(0, 1)
        drafter.append(0, 2)
        before.append(len(drafter.choose([(0, 8, ())], **cost)[0]))
    assert before[0] > 0
    assert before[-1] == 0


def test_a_slot_forgets_its_last_sequence() -> None:
    drafter = drafter_of([7, 8, 9, 7, 8])
    drafter.start(0, np.array([1, 2, 3], np.int32))
    assert drafter.choose([(0, 3, ())], **FREE) == [[]]


def test_slots_out_of_range_are_refused() -> None:
    drafter = ops.Drafter(num_slots=2, shortest=2, longest=8)
    with pytest.raises(ValueError, match="slot"):
        drafter.start(2, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="slot"):
        drafter.choose([(-1, 1, ())], **FREE)
    with pytest.raises(ValueError, match="longest"):
        ops.Drafter(num_slots=2, shortest=9, longest=8)


def test_a_short_sequence_does_not_keep_the_memory_of_a_long_one() -> None:
    drafter = ops.Drafter(num_slots=16, shortest=2, longest=32)
    return_freed_memory()  # or the sequences might use what other tests have freed
    before = resident_bytes()
    for slot in range(16):
        drafter.start(slot, np.arange(130_000, dtype=np.int32))
    held = resident_bytes() - before
    for slot in range(16):
        drafter.start(slot, np.arange(10, dtype=np.int32))
    return_freed_memory()
    assert held > 20 << 20
    assert resident_bytes() - before < held / 4
