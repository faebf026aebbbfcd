"""Prompts for text between two others: each family's marks, and vocabularies without them."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tests.support.toy_tokenizer import ToyTokenizer
from tgi_asgi.text.fill import fill_of
from tgi_asgi.text.tokenizer import Tokenizer

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@pytest.mark.parametrize(
    ("marks", "prompt"),
    [
        (QWEN, "<|fim_prefix|>a = <|fim_suffix|>\n<|fim_middle|>"),
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "<fim_prefix>a = <fim_suffix>\n<fim_middle>"),
        (
            ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001
            "<｜fim▁begin｜>a = <｜fim▁hole｜>\n<｜fim▁end｜>",  # noqa: RUF001
        ),
        (("[PREFIX]", "[SUFFIX]", "[MIDDLE]"), "[SUFFIX]\n[PREFIX]a = "),
        (
            ("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"),
            "<[fim-suffix]>\n<[fim-prefix]>a = <[fim-middle]>",
        ),
    ],
)
def test_each_family_has_its_own_form(marks: tuple[str, ...], prompt: str) -> None:
    fill = fill_of(ToyTokenizer(marks=marks))
    assert fill is not None
    assert fill.marks.prompt("a = ", "\n") == prompt


@pytest.mark.parametrize("marks", [(), QWEN[:2], ("<PREFIX>", "<SUFFIX>")])
def test_a_vocabulary_without_all_marks_cannot_fill_in(marks: tuple[str, ...]) -> None:
    assert fill_of(ToyTokenizer(marks=marks)) is None


@pytest.mark.parametrize("special", [True, False])
def test_marks_need_not_be_special_tokens(special: bool) -> None:
    """Those of Qwen's tokenizers are not, in some of its files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, normalized=False, special=special) for text in QWEN])
    tokenizer = Tokenizer(backend, {})
    fill = fill_of(tokenizer)
    assert fill is not None
    ids = tokenizer.encode(fill.marks.prompt("a", "b"), add_special_tokens=False)
    assert [tokenizer.token_text(i) for i in ids] == [QWEN[0], "a", QWEN[1], "b", QWEN[2]]


def test_the_token_of_unknown_words_is_no_mark() -> None:
    class Unknowing(ToyTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool, is_marked: bool = False) -> list[int]:
            return [97]

    assert fill_of(Unknowing()) is None


def test_marks_and_the_beginnings_of_other_files_end_the_answer() -> None:
    tokenizer = ToyTokenizer(marks=(*QWEN, "<|file_sep|>", "<|fim_pad|>", "<|tool|>"))
    fill = fill_of(tokenizer)
    assert fill is not None
    assert {tokenizer.token_text(i) for i in fill.end_ids} == {*QWEN, "<|file_sep|>", "<|fim_pad|>"}
