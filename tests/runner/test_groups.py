"""Which layers share block tables, and how many blocks a sequence needs."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgi_asgi.runner.groups import BlockNeeds, CacheGroups

_EACH_SIXTH = [None if layer % 6 == 5 else 512 for layer in range(26)]


@pytest.mark.parametrize(
    ("windows", "expected", "num_each"),
    [
        ([None] * 30, (None,), 30),
        ([4096] * 32, (4096,), 32),
        (_EACH_SIXTH, (None, 512, 512, 512, 512, 512, 512), 4),
        ([None, 128] * 18, (None, 128), 18),
        ([None] * 10 + [64] * 11, (None, 64), 11),
        ([None, 4096, 4096, 512, 512], (None, 4096, 4096, 512, 512), 1),
        ([], (None,), 0),
    ],
)
def test_layers_of_a_kind_are_cut_into_groups_of_one_size(
    windows: list[int | None], expected: tuple[int | None, ...], num_each: int
) -> None:
    groups = CacheGroups.of(windows, [100] * len(windows))
    assert groups.windows == expected
    assert groups.bytes_per_token == 100 * num_each
    assert [groups.windows[group] for group in groups.of_layers] == windows


@given(st.lists(st.tuples(st.sampled_from([None, 64, 512, 1024]), st.sampled_from([8, 24, 32])), min_size=1))
def test_a_group_s_layers_have_one_window_and_fit_a_block(layers: list[tuple[int | None, int]]) -> None:
    groups = CacheGroups.of([window for window, _ in layers], [size for _, size in layers])
    held = Counter[int]()
    for (window, size), group in zip(layers, groups.of_layers, strict=True):
        assert groups.windows[group] == window
        held[group] += size
    assert set(held) == set(range(len(groups.windows)))
    assert max(held.values()) <= groups.bytes_per_token
    if len({size for _, size in layers}) == 1:  # otherwise some blocks may be partly empty
        total = sum(size for _, size in layers)
        assert groups.bytes_per_token * len(groups.windows) <= 1.1 * total


def test_a_sequence_holds_its_window_and_a_step_s_tokens() -> None:
    needs = BlockNeeds((None, 512), 16, max_step_tokens=256)
    assert needs.total_for(16384) == 1024 + 32 + 16 + 1
    assert needs.total_for(100) == 7 + 7
    assert needs.total_for(16384, keeps_all=True) == 2 * 1024


@given(
    st.integers(1, 60),
    st.sampled_from([1, 4, 16]),
    st.integers(1, 40),
    st.integers(1, 400),
    st.integers(0, 90),
)
def test_no_more_tokens_are_promised_than_there_are_blocks_for(
    window: int, block_size: int, max_step_tokens: int, most: int, num_blocks: int
) -> None:
    needs = BlockNeeds((None, window), block_size, max_step_tokens)
    longest = needs.longest_fitting(num_blocks, most)
    assert needs.total_for(longest) <= num_blocks
    assert longest == most or needs.total_for(longest + 1) > num_blocks


@given(st.integers(1, 40), st.sampled_from([1, 4, 16]), st.integers(0, 200))
def test_the_first_block_that_is_read_has_the_first_position_in_the_window(
    window: int, block_size: int, position: int
) -> None:
    first = BlockNeeds((window,), block_size, 1).first_read(0, position)
    seen = [at for at in range(position + 1) if position - at < window]
    assert first == seen[0] // block_size
