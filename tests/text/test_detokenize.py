"""The UTF-8 assembler against `bytes.decode`, for any cuts."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from tgi_asgi.text.detokenize import Utf8Assembler

# Bytes of text and of damaged text: lead bytes, continuations, surrogates, over-long forms.
_PIECES = st.one_of(
    st.text(max_size=3).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(
        [b"\xf0", b"\x9f\x98", b"\x80", b"\xe0\x80", b"\xed\xa0", b"\xc0", b"\xff", b"\xf4\x90", b"\xe2\x82"]
    ),
    st.binary(max_size=2),
)


@given(st.lists(_PIECES, max_size=12), st.data())
@example([b"\xf0\x9f\x98", b"a"], None)
def test_any_cut_of_any_bytes_decodes_like_the_whole(pieces: list[bytes], data: st.DataObject | None) -> None:
    whole = b"".join(pieces)
    if data is not None:  # cut anywhere, not only between the pieces
        at = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
        pieces = [whole[start:stop] for start, stop in zip([0, *at], [*at, len(whole)], strict=True)]
    assembler = Utf8Assembler()
    text = "".join(assembler.push(piece) for piece in pieces) + assembler.flush()
    assert text == whole.decode("utf-8", "replace")


def test_an_emoji_comes_out_whole_with_its_last_byte() -> None:
    assembler = Utf8Assembler()
    pushed = [assembler.push(bytes([byte])) for byte in "é😀".encode()]
    assert pushed == ["", "é", "", "", "", "😀"]


def test_bytes_that_can_no_longer_become_a_character_are_replaced_at_once() -> None:
    assembler = Utf8Assembler()
    assert assembler.push(b"\xe2\x82") == ""
    assert assembler.push(b"x") == "\ufffdx"
    assert assembler.push(b"\xed") == ""
    assert assembler.push(b"\xa0") == "\ufffd\ufffd"  # the start of a surrogate


def test_flush_replaces_the_head_of_a_character_once() -> None:
    assembler = Utf8Assembler()
    assert assembler.push("a€".encode()[:-1]) == "a"
    assert assembler.flush() == "\ufffd"
    assert assembler.flush() == ""
    assert assembler.push(b"b") == "b"
