"""Tokenizers rebuilt from GGUF metadata: splits of named pre-tokenizers, sentencepiece, damaged files."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.text.token_bytes import byte_alphabet
from tgi_asgi.text.tokenizer import Tokenizer

CHARACTERS = {byte: character for character, byte in byte_alphabet().items()}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def spell(text: str) -> str:
    """Return text in the byte-level alphabet."""
    return "".join(CHARACTERS[byte] for byte in text.encode())


def byte_level(pre: str, *words: str, control: tuple[str, ...] = (), **extra: Any) -> dict[str, Any]:
    """Return metadata of a vocabulary: all bytes, words with their merges, and control tokens."""
    tokens, merges = [CHARACTERS[byte] for byte in range(256)], []
    for word in map(spell, words):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    types = [NORMAL] * len(tokens) + [CONTROL] * len(control)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *control],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": np.array(types, "<i4"),
        **{f"tokenizer.ggml.{name}": value for name, value in extra.items()},
    }


def pieces(pre: str, text: str) -> list[str]:
    """Split text as this pre-tokenizer does."""
    backend = Tokenizer.from_gguf(byte_level(pre))._backend
    return [text[start:stop] for _, (start, stop) in backend.pre_tokenizer.pre_tokenize_str(text)]


# According to the regular expressions of the models' own tokenizer.json files.
CUTS = [
    ("gpt-2", "I'll go  12345 far\n\n\nX", ["I", "'ll", " go", " ", " 12345", " far", "\n\n", "\n", "X"]),
    ("smollm", "it's 12½ x", ["it", "'s", " ", "1", "2", "½", " x"]),
    ("starcoder", "a1b22", ["a", "1", "b", "2", "2"]),
    ("llama-bpe", "I'LL 12345 (ok)\n\n X", ["I", "'LL", " ", "123", "45", " (", "ok", ")\n\n", " X"]),
    ("llama-bpe", "a\n \n  b", ["a", "\n \n", " ", " b"]),
    ("qwen2", "I'LL 123 (ok)", ["I", "'LL", " ", "1", "2", "3", " (", "ok", ")"]),
    ("tekken", "HelloWorld 12/ab", ["Hello", "World", " ", "1", "2", "/ab"]),
    ("gpt-4o", "HelloWORLD's 1234", ["Hello", "WORLD's", " ", "123", "4"]),
    ("deepseek-coder", "ab, 12\n你好x", ["ab", ",", " ", "1", "2", "\n", "你好", "x"]),
    ("falcon", "ab,, 12345 x'll", ["ab", ",,", " ", "123", "45", " x", "'", "ll"]),
    ("kimi-k2", "HelloWorld你好x 1234's", ["Hello", "World", "你好", "x", " ", "123", "4", "'s"]),
    ("afmoe", "a 12345ก1234", ["a", " ", "12", "345", "ก", "1", "234"]),
    ("deepseek-llm", "ab. 12\n你x", ["ab", ".", " ", "1", "2", "\n", "你", "x"]),
    ("deepseek-v3", "ab 1234你好x(y", ["ab", " ", "123", "4", "你好", "x", "(y"]),
]


@pytest.mark.parametrize(("pre", "text", "expected"), CUTS)
def test_each_pre_tokenizer_cuts_as_its_model_was_trained(pre: str, text: str, expected: list[str]) -> None:
    assert pieces(pre, text) == expected


@pytest.mark.parametrize("pre", [None, "default", "qwen-9", 7])
def test_a_pre_tokenizer_that_is_not_known_is_refused(pre: Any) -> None:
    metadata = byte_level("smollm")
    metadata["tokenizer.ggml.pre"] = pre
    with pytest.raises(ModelLoadError, match=f"pre-tokenizer is {pre!r}, which is not supported; known are"):
        Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("kind", [None, "whitespace", "rwkv", 1])
def test_a_kind_of_vocabulary_that_is_not_known_is_refused(kind: Any) -> None:
    with pytest.raises(ModelLoadError, match=f"of the kind {kind!r}"):
        Tokenizer.from_gguf({"tokenizer.ggml.model": kind})


def word_pieces(*tokens: str) -> dict[str, Any]:
    found = ["[UNK]", "[CLS]", "[SEP]", *tokens]
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": found,
        "tokenizer.ggml.token_type": np.array([3, 3, 3, *(1 for _ in tokens)], "<i4"),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.seperator_token_id": 2,
    }


def test_word_pieces_are_lowered_as_the_file_or_its_vocabulary_says() -> None:
    def encode(metadata: dict[str, Any]) -> list[int]:
        return Tokenizer.from_gguf(metadata).encode("Ab", add_special_tokens=True)

    assert encode(word_pieces("\u2581ab", "\u2581a", "b")) == [1, 3, 2]
    assert encode(word_pieces("\u2581ab", "\u2581A", "b")) == [1, 4, 5, 2]
    lowered = word_pieces("\u2581ab", "\u2581A", "b") | {"tokenizer.ggml.normalizer.lowercase": True}
    assert encode(lowered) == [1, 3, 2]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seperator_token_id": 99}, "no token that ends a text"),
        ({"unknown_token_id": 99}, "no token for unknown words"),
        ({"normalizer.lowercase": 1}, "must be true or false"),
        ({"token_type": np.array([3, 3, 3, 1, 3], "<i4")}, "the same token twice"),
    ],
)
def test_damaged_word_pieces_are_refused(changes: dict[str, Any], reason: str) -> None:
    given = word_pieces("\u2581x", "x") | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ModelLoadError, match=reason):
        Tokenizer.from_gguf(given)


def test_llama_3_takes_a_whole_word_without_its_merges() -> None:
    metadata = byte_level("llama-bpe", "ab")
    metadata["tokenizer.ggml.tokens"] += ["xyz"]
    metadata["tokenizer.ggml.token_type"] = np.ones(len(metadata["tokenizer.ggml.tokens"]), "<i4")
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert Tokenizer.from_gguf(metadata).encode("xyz", add_special_tokens=False) == [last]
    metadata["tokenizer.ggml.pre"] = "gpt-2"
    assert len(Tokenizer.from_gguf(metadata).encode("xyz", add_special_tokens=False)) == 3


def test_some_vocabularies_compose_characters_first() -> None:
    decomposed, composed = "e\u0301", "\u00e9"
    for pre, same in (("qwen2", True), ("qwen35", True), ("command-r", True), ("gpt-2", False)):
        tokenizer = Tokenizer.from_gguf(byte_level(pre))
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in (decomposed, composed)]
        assert (ids[0] == ids[1]) is same, pre


@pytest.mark.parametrize(
    ("pre", "flag", "expected"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", None, False), ("gpt-2", True, True)],
)
def test_bos_is_added_where_the_file_or_the_model_says_so(
    pre: str, flag: bool | None, expected: bool
) -> None:
    extra = {} if flag is None else {"add_bos_token": flag}
    tokenizer = Tokenizer.from_gguf(byte_level(pre, control=("<|begin|>",), bos_token_id=256, **extra))
    assert tokenizer.adds_bos is expected
    assert tokenizer.encode("a", add_special_tokens=True) == [256] * expected + [ord("a")]
    assert tokenizer.encode("a", add_special_tokens=False) == [ord("a")]


def test_a_token_that_ends_a_turn_and_that_a_user_defined_is_a_control_token() -> None:
    """Files that were made from an added_tokens.json have ChatML's so."""
    metadata = byte_level("qwen2", control=("<|endoftext|>", "<|im_end|>", "<tool>"), eos_token_id=256)
    types = metadata["tokenizer.ggml.token_type"]
    types[-2:] = 4  # defined by a user
    tokenizer = Tokenizer.from_gguf(metadata)
    im_end, tool = len(types) - 2, len(types) - 1
    assert tokenizer.token_text(im_end) == "<|im_end|>" and im_end in tokenizer.eos_ids
    assert tool not in tokenizer.eos_ids
    assert tokenizer.decode([ord("a"), im_end, tool], skip_special_tokens=True) == "a<tool>"


def test_every_token_that_ends_a_turn_ends_an_answer() -> None:
    control = ("<|end_of_text|>", "<|eot_id|>", "<mine>", "<other>")
    tokenizer = Tokenizer.from_gguf(
        byte_level("llama-bpe", "<|end|>", control=control, eos_token_id=256, eom_token_id=258)
    )
    texts = {tokenizer.token_text(token_id) for token_id in tokenizer.eos_ids}
    # "<|end|>" is an ordinary token here, so text that only looks like it must not end an answer.
    assert tokenizer.eos_id == 256 and len(tokenizer.eos_ids) == len(texts)
    assert "<|eot_id|>" in texts and "<|end|>" not in texts and "<other>" not in texts


@pytest.mark.parametrize(
    ("control", "ends"),
    [
        (("<|end|>", "<|endoftext|>"), {"<|end|>", "<|endoftext|>"}),  # Phi 3
        (("<|end|>", "<|return|>", "<|call|>"), {"<|return|>", "<|call|>"}),  # gpt-oss: of one message
        (("<|end|>", "<|flush|>", "<|calls|>"), {"<|flush|>", "<|calls|>"}),  # Solar Open
        (("</s>", "<|im_end|>", "[INST]"), {"</s>", "<|im_end|>"}),
        (("<eos>", "<turn|>", "<|tool_response>"), {"<eos>", "<turn|>", "<|tool_response>"}),
        (("<|fim_pad|>", "<|fim_middle|>"), {"<|fim_pad|>"}),
    ],
)
def test_tokens_that_end_an_answer_are_llama_cpps(control: tuple[str, ...], ends: set[str]) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level("qwen2", control=control))
    assert {tokenizer.token_text(token_id) for token_id in tokenizer.eos_ids} == ends


@pytest.mark.parametrize("key", ["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"])
def test_tokens_that_a_key_names_end_an_answer(key: str) -> None:
    metadata = {**byte_level("gpt-2"), f"tokenizer.ggml.{key}_token_id": 7}
    assert Tokenizer.from_gguf(metadata).eos_ids == {7}


def test_padding_that_is_text_stays_text() -> None:
    metadata = byte_level("gpt-2", control=("<eos>",), padding_token_id=0, eos_token_id=256)
    assert Tokenizer.from_gguf(metadata).special_ids == {256}
    del metadata["tokenizer.ggml.token_type"]
    assert Tokenizer.from_gguf(metadata).special_ids == {0, 256}


def test_a_tag_that_a_user_defined_ends_no_answer() -> None:
    metadata = byte_level("qwen2", control=("</s>", "<eos>"))
    metadata["tokenizer.ggml.token_type"][-2:] = USER_DEFINED
    assert Tokenizer.from_gguf(metadata).eos_ids == frozenset()


def test_user_defined_tokens_are_found_whole_and_are_not_special() -> None:
    metadata = byte_level("gpt-2", control=("<|a|>", "<think>"))
    metadata["tokenizer.ggml.token_type"] = np.array([NORMAL] * 256 + [CONTROL, USER_DEFINED], "<i4")
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("<think><|a|>", add_special_tokens=False) == [257, 256]
    assert tokenizer.special_ids == {256}
    assert tokenizer.decode([257, 256], skip_special_tokens=True) == "<think>"


def test_special_ids_outside_the_vocabulary_are_ignored() -> None:
    tokenizer = Tokenizer.from_gguf(
        byte_level("gpt-2", bos_token_id=10**6, eos_token_id="x", pad_token_id=-1)
    )
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (None, None, frozenset())
    assert tokenizer.special_tokens == {}


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "no tokens": ("tokens", None, "no usable"),
    "empty tokens": ("tokens", [], "no usable"),
    "tokens are a string": ("tokens", "abc", "no usable"),
    "tokens are numbers": ("tokens", [*range(256)], "damaged"),
    "tokens are lists": ("tokens", [["a"], ["b"]], "damaged"),
    "same token twice": ("tokens", ["a", "a"], "same token twice"),
    "no merges": ("merges", None, "no `tokenizer.ggml.merges`"),
    "merges are a string": ("merges", "a b", "no `tokenizer.ggml.merges`"),
    "merge of one": ("merges", ["ab"], "damaged"),
    "merge of strangers": ("merges", ["zz yy"], "damaged"),
    "merges are numbers": ("merges", [1], "damaged"),
    "types too short": ("token_type", np.ones(3, "<i4"), "must be an array of 256 numbers"),
    "types are a string": ("token_type", "x" * 256, "must be an array of 256 numbers"),
}


@pytest.mark.parametrize(("name", "value", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_vocabulary_is_refused(name: str, value: Any, reason: str) -> None:
    metadata = byte_level("gpt-2")
    if value is None:
        del metadata[f"tokenizer.ggml.{name}"]
    else:
        metadata[f"tokenizer.ggml.{name}"] = value
    with pytest.raises(ModelLoadError, match=reason):
        Tokenizer.from_gguf(metadata)


WORDS = [
    "ab",
    "abc",
    "bc",
    "ca",
    "abca",
    "\u2581a",
    "\u2581ab",
    "\u2581\u2581",
    "cab",
    "b\u2581",
    "\u2581the",
    "th",
    "he",
]


def sentencepiece(**extra: Any) -> dict[str, Any]:
    """Return metadata of a sentencepiece vocabulary: controls, bytes, letters, words with random scores."""
    letters = ["\u2581", *"abcthe"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *WORDS]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(letters) + len(WORDS))]
    order = random.Random(5).sample(range(len(WORDS)), len(WORDS))
    scores = (
        [0.0] * 259 + [-1000.0 - index for index in range(len(letters))] + [-1.0 - rank for rank in order]
    )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, "<i4"),
        "tokenizer.ggml.scores": np.array(scores, "<f4"),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in extra.items()},
    }


def merge_by_definition(metadata: dict[str, Any], text: str) -> list[int]:
    """Tokenise by sentencepiece's definition of BPE: merge the best-scored neighbours, leftmost first."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {token: index for index, token in enumerate(tokens) if index >= 259}
    scores = metadata["tokenizer.ggml.scores"]
    symbols = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        candidates = [
            (-scores[ids[left + right]], at)
            for at, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in ids
        ]
        if not candidates:
            break
        _, at = min(candidates)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    result = []
    for symbol in symbols:
        result += [ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()]
    return result


def test_sentencepiece_merges_by_score() -> None:
    metadata = sentencepiece()
    tokenizer = Tokenizer.from_gguf(metadata)
    rng = random.Random(11)
    for _ in range(500):
        text = "".join(rng.choices("aaabbbccthe  é\n", k=rng.randrange(1, 25)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == merge_by_definition(metadata, text), repr(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == (" " + text).encode()
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_sentencepiece_adds_bos_and_a_space_unless_told_otherwise() -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece())
    assert tokenizer.adds_bos and tokenizer.encode("", add_special_tokens=True) == [1]
    assert tokenizer.special_ids == {0, 1, 2}
    plain = Tokenizer.from_gguf(sentencepiece(add_bos_token=False, add_space_prefix=False))
    assert not plain.adds_bos
    assert plain.decode(plain.encode(" ab", add_special_tokens=True), skip_special_tokens=True) == " ab"
    assert b"".join(map(plain.token_bytes, plain.encode("ab", add_special_tokens=True))) == b"ab"


@pytest.mark.parametrize("token_id", [None, 10**6])
def test_sentencepiece_has_the_usual_bos_and_eos_unless_told_otherwise(token_id: int | None) -> None:
    metadata = sentencepiece(bos_token_id=token_id, eos_token_id=token_id)
    tokenizer = Tokenizer.from_gguf(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, frozenset({2}), True)
    assert Tokenizer.from_gguf({**metadata, "tokenizer.ggml.eos_token_id": 1}).eos_id == 1


@pytest.mark.parametrize(("architecture", "is_kept"), [("phi3", False), ("llama", True)])
def test_special_tokens_of_phi_3_take_the_space_after_them(architecture: str, is_kept: bool) -> None:
    tokenizer = Tokenizer.from_gguf({**sentencepiece(), "general.architecture": architecture})
    ids = tokenizer.encode("</s> a<s> a", add_special_tokens=False)
    space = tokenizer.encode("a", add_special_tokens=False)
    kept = tokenizer.encode(" a", add_special_tokens=False)
    assert kept != space
    assert ids == [2, *(kept if is_kept else space), 1, *kept]


@pytest.mark.parametrize("says", [None, False, True])
def test_sentencepiece_with_merges_in_the_file_adds_no_space(says: bool | None) -> None:
    metadata = sentencepiece(model="gemma4", merges=["a b"], add_space_prefix=says)
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = tokenizer.encode("ab", add_special_tokens=False)
    assert [tokenizer.token_text(token_id) for token_id in ids] == ["ab"]


def test_text_cannot_spell_a_control_token_by_merges() -> None:
    metadata = sentencepiece()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index("he")] = "<"
    tokens[tokens.index("th")] = "s>"
    tokenizer = Tokenizer.from_gguf(metadata)
    merges = tokenizer._backend.model.__getstate__()
    assert b"<s>" not in merges.split(b'"merges"')[1]


@pytest.mark.parametrize("scores", [None, np.zeros(3, "<f4")])
def test_sentencepiece_needs_a_score_a_token(scores: Any) -> None:
    metadata = sentencepiece()
    metadata["tokenizer.ggml.scores"] = scores
    with pytest.raises(ModelLoadError, match=r"tokenizer\.ggml\.scores"):
        Tokenizer.from_gguf(metadata)


def test_a_huge_piece_is_refused_before_it_costs_anything() -> None:
    metadata = sentencepiece()
    metadata["tokenizer.ggml.tokens"][-1] = "a" * 10_000_000
    with pytest.raises(ModelLoadError, match="a token of 10000000 characters"):
        Tokenizer.from_gguf(metadata)
