from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tgi_asgi.engine.token_ids import TokenIds

IDS = st.lists(st.integers(0, 9), max_size=6)
ENDS = st.none() | st.integers(-8, 14)


@given(prompt=IDS, output=IDS, start=ENDS, stop=ENDS)
def test_it_is_read_like_one_list(
    prompt: list[int], output: list[int], start: int | None, stop: int | None
) -> None:
    ids = TokenIds(prompt)
    ids.output += output
    whole = prompt + output
    assert len(ids) == len(whole)
    assert list(ids) == whole
    assert ids[start:stop] == whole[start:stop]
    for index in range(-len(whole), len(whole)):
        assert ids[index] == whole[index]


def test_a_slice_is_the_caller_s() -> None:
    prompt = [1, 2, 3]
    ids = TokenIds(prompt)
    ids.output.append(4)
    for part in (ids[:3], ids[3:], ids[:]):
        part.append(9)
    assert prompt == [1, 2, 3]
    assert ids.output == [4]
