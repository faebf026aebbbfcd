"""Checkpoints without tokenizer.json, against sentencepiece's own library and `transformers`."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import random
import sys
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
import sentencepiece
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.text.sentencepiece_file import read_model
from tgi_asgi.text.token_bytes import byte_alphabet
from tgi_asgi.text.tokenizer import Tokenizer

DOCS = Path(__file__).parents[2] / "docs"
SYMBOLS = ["<|im_start|>", "<|im_end|>"]
TEXT_UNCHANGED = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "split_digits": True, **TEXT_UNCHANGED},
    "gemma": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, **TEXT_UNCHANGED},
    "normalised": {"model_type": "bpe", "byte_fallback": True},
    "unigram": {"model_type": "unigram", "byte_fallback": True},
    "unigram without bytes": {"model_type": "unigram", **TEXT_UNCHANGED},
}
TEXTS = [
    "", " ", "Hello  world", "  two before", "two behind  ", "ﬁne 日本 €", "a\nb\tc", "12345",
    "naïve café \u00a0x", "x" * 50, "def f(x):\n    return x\n", "e\u0301",
]  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that trains a sentencepiece model of a kind."""
    folder = tmp_path_factory.mktemp("sentencepiece")

    def train(kind: str) -> Path:
        path = folder / f"{kind}.model"
        if not path.exists():
            sentencepiece.SentencePieceTrainer.train(
                input=str(DOCS / "wire.md"),
                model_prefix=str(path.with_suffix("")),
                vocab_size=700,
                user_defined_symbols=SYMBOLS,
                minloglevel=2,
                **KINDS[kind],
            )
        return path

    return train


def texts() -> list[str]:
    return TEXTS + (DOCS / "architecture.md").read_text("utf-8").split("\n\n")[:80]


def checkpoint(folder: Path, model_type: str, **files: Any) -> Path:
    """Write files, bytes as they are and other values as JSON; the last `_` of a name becomes a dot."""
    config = {"model_type": model_type, "eos_token_id": 2}
    for name, content in {"config_json": config, **files}.items():
        stem, _, end = name.rpartition("_")
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / f"{stem}.{end}").write_bytes(data)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        Tokenizer.from_directory(folder)
    return str(caught.value)


def is_tie(truth: sentencepiece.SentencePieceProcessor, found: list[int], ids: list[int]) -> bool:
    """Return whether both are the same text, equally likely in a unigram model up to float32's rounding."""
    whole = ["".join(map(truth.id_to_piece, each)) for each in (found, ids)]
    scores = [sum(map(truth.get_score, each)) for each in (found, ids)]  # logarithms of probabilities
    return whole[0] == whole[1] and math.isclose(*scores, rel_tol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_sentencepiece(trained: Callable[[str], Path], kind: str) -> None:
    truth = sentencepiece.SentencePieceProcessor(str(trained(kind)))
    backend = read_model(trained(kind)).backend()
    for text in texts():
        ids = truth.encode(text)
        found = backend.encode(text, add_special_tokens=False).ids
        has_ties = KINDS[kind]["model_type"] == "unigram"  # each library breaks ties in its own way
        assert found == ids or (has_ties and is_tie(truth, found, ids)), text
        if truth.unk_id() not in ids:
            assert backend.decode(ids) == truth.decode(ids), text
    for symbol in SYMBOLS:
        assert backend.encode(symbol, add_special_tokens=False).ids == [truth.piece_to_id(symbol)]


@pytest.mark.parametrize("is_legacy", [True, False])
def test_a_llama_s_tokenizer_model_is_read_as_transformers_does(
    trained: Callable[[str], Path], tmp_path: Path, is_legacy: bool
) -> None:
    """Without `legacy`, no space goes before what follows a special token."""
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": is_legacy}
    data = trained("llama").read_bytes()
    folder = checkpoint(tmp_path, "llama", tokenizer_model=data, tokenizer_config_json=config)
    truth = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_directory(folder)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.eos_ids == {2} and tokenizer.adds_bos
    texts = ["Hello world", "one\ntwo", "x <|im_start|>user", "<s>a</s>b c", ""]
    # Before a space, transformers 5 leaves the other one out even for older files; 4, and so TGI, did not.
    for text in [*texts, *([] if is_legacy else ["c<s> d", " a  b"])]:
        assert tokenizer.encode(text, add_special_tokens=False) == truth.encode(
            text, add_special_tokens=False
        )
        assert tokenizer.encode(text, add_special_tokens=True)[0] == tokenizer.bos_id
    marked = tokenizer.encode(f"{tokenizer.guard.mark}<s>a", add_special_tokens=False, is_marked=True)
    assert marked == truth.encode("<s>a", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode_inside("a b"))) == b"a b"
    assert tokenizer.drops_first_space


@pytest.mark.parametrize(
    ("config", "around"),
    [
        ({}, (1, 0)),
        ({"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["a.B", None]}}, (1, 0)),
        ({"tokenizer_class": "BaichuanTokenizer", "add_bos_token": False}, (0, 0)),
        ({"add_eos_token": True, "eos_token": {"content": "</s>"}}, (1, 1)),
    ],
)
def test_what_goes_around_a_text_is_the_configuration_s_to_say(
    trained: Callable[[str], Path], tmp_path: Path, config: dict[str, Any], around: tuple[int, int]
) -> None:
    data = trained("llama").read_bytes()
    folder = checkpoint(tmp_path, "internlm2", tokenizer_model=data, tokenizer_config_json=config)
    tokenizer = Tokenizer.from_directory(folder)
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    whole = tokenizer.encode("Hello", add_special_tokens=True)
    assert whole[around[0] : len(whole) - around[1]] == plain
    assert len(whole) == len(plain) + sum(around)


def test_added_tokens_keep_their_ids(trained: Callable[[str], Path], tmp_path: Path) -> None:
    data = trained("llama").read_bytes()
    added = {"<pad>": 701, "<tool>": 700}
    folder = checkpoint(tmp_path, "llama", tokenizer_model=data, added_tokens_json=added)
    tokenizer = Tokenizer.from_directory(folder)
    assert tokenizer.encode("<tool><pad>", add_special_tokens=False) == [700, 701]
    checkpoint(tmp_path, "llama", added_tokens_json={"<pad>": 800})
    assert "the token '<pad>' should have the id 800, and has 700" in refusal(folder)
    checkpoint(tmp_path, "llama", added_tokens_json={"<pad>": "800"})
    assert "must give each token a number" in refusal(folder)


def test_spare_tokens_get_the_names_that_the_configuration_lists(
    trained: Callable[[str], Path], tmp_path: Path
) -> None:
    """InternLM 2's chats use tokens that its vocabulary calls unused."""
    spare = sentencepiece.SentencePieceProcessor(model_file=str(trained("llama"))).piece_to_id(SYMBOLS[0])
    listed = {
        str(spare): {"content": "<|plugin|>", "special": True, "normalized": False},
        "700": {"content": "<new>", "special": False, "normalized": False},
    }
    config = {"tokenizer_class": "InternLM2Tokenizer", "added_tokens_decoder": listed}
    data = trained("llama").read_bytes()
    folder = checkpoint(tmp_path, "internlm2", tokenizer_model=data, tokenizer_config_json=config)
    tokenizer = Tokenizer.from_directory(folder)
    assert tokenizer.encode("<|plugin|><new>", add_special_tokens=False) == [spare, 700]
    assert spare in tokenizer.special_ids and 700 not in tokenizer.special_ids
    assert tokenizer.decode([spare], skip_special_tokens=False) == "<|plugin|>"


@pytest.mark.parametrize("has_roles", [False, True])
def test_chatglm_adds_its_tokens_after_sentencepiece_s(
    trained: Callable[[str], Path], tmp_path: Path, has_roles: bool
) -> None:
    path = trained("llama")
    truth = sentencepiece.SentencePieceProcessor(model_file=str(path))
    config: dict[str, Any] = {"tokenizer_class": "ChatGLMTokenizer"}
    if has_roles:
        config["added_tokens_decoder"] = {
            "701": {"content": "[gMASK]", "special": True}, "706": {"content": "<|user|>", "special": True},
        }  # fmt: skip
    folder = checkpoint(tmp_path, "chatglm", tokenizer_model=path.read_bytes(), tokenizer_config_json=config)
    tokenizer = Tokenizer.from_directory(folder)
    plain = tokenizer.encode("Hello  world", add_special_tokens=False)
    assert plain == truth.encode("Hello  world")
    assert tokenizer.encode("Hello  world", add_special_tokens=True) == [701, 703, *plain]
    assert tokenizer.encode_pair("a", "b")[0][:2] == [701, 703]
    users = tokenizer.encode("[gMASK]sop<|user|>", add_special_tokens=False)
    assert users[:2] == [701, 703] and (users[2:] == [706]) == has_roles
    assert tokenizer.eos_ids == {2}


def ranks_file(folder: Path) -> tuple[bytes, dict[bytes, int]]:
    """Return a small vocabulary of tiktoken, as a file and as ranks."""
    byte_level_files(folder)
    letters = byte_alphabet()
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    tokens = [bytes(letters[letter] for letter in text) for text in vocab if text != "<|endoftext|>"]
    ranks = {token: rank for rank, token in enumerate(sorted(tokens, key=lambda token: (len(token), token)))}
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    return b"".join(lines), ranks


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Return the ids of a piece by tiktoken's rule: the first neighbours of the lowest rank merge."""
    parts = [piece] if piece in ranks else [bytes([byte]) for byte in piece]
    while pairs := [
        (ranks[parts[at] + parts[at + 1]], at)
        for at in range(len(parts) - 1)
        if parts[at] + parts[at + 1] in ranks
    ]:
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


@pytest.mark.parametrize(
    ("kind", "name", "numbers"),
    [("QWenTokenizer", "qwen_tiktoken", r"\p{N}"), ("ChatGLM4Tokenizer", "tokenizer_model", r"\p{N}{1,3}")],
)
def test_ranks_of_tiktoken_are_read_as_its_rule_says(
    tmp_path: Path, kind: str, name: str, numbers: str
) -> None:
    """So do 20,000 random texts, compared once with tiktoken itself."""
    data, ranks = ranks_file(tmp_path)
    size = len(ranks)
    config: dict[str, Any] = {"tokenizer_class": kind}
    if kind == "ChatGLM4Tokenizer":
        names = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<|user|>")
        listed = {str(size + at): {"content": text, "special": True} for at, text in enumerate(names)}
        config |= {"eos_token": "<|endoftext|>", "added_tokens_decoder": listed}
    folder = checkpoint(tmp_path, kind, **{name: data}, tokenizer_config_json=config, config_json={})
    tokenizer = Tokenizer.from_directory(folder)
    pattern = regex.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip
    normal = partial(unicodedata.normalize, "NFC") if kind == "QWenTokenizer" else str
    for text in [*TEXTS, *texts(), "=" * 41 + " " * 63 + "I'LL 12345\r\n\n x"]:
        expected = [each for piece in pattern.findall(normal(text)) for each in merged(piece.encode(), ranks)]
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.decode(expected, skip_special_tokens=True) == normal(text)
    if kind == "QWenTokenizer":
        chat = tokenizer.encode("<|im_start|><|im_end|><|extra_204|>", add_special_tokens=True)
        assert chat == [size + 1, size + 2, size + 207]
        assert tokenizer.eos_ids == {size, size + 2}
    else:
        assert tokenizer.encode("<|user|>", add_special_tokens=True) == [size + 2, size + 4, size + 5]
        assert tokenizer.eos_ids == {size}


@pytest.mark.parametrize(
    "data", [b"\n", b"QQ== 0\n", b"QQ== 0\nQQ== 1\n", b"!! 0\n", b"QQ== one\n", b"QQ==\n"]
)
def test_damaged_ranks_are_refused(tmp_path: Path, data: bytes) -> None:
    config = {"tokenizer_class": "QWenTokenizer"}
    folder = checkpoint(tmp_path, "qwen", qwen_tiktoken=data, tokenizer_config_json=config)
    assert "qwen.tiktoken is not a tiktoken vocabulary" in refusal(folder)


@pytest.mark.parametrize("data", [b" \n", b"\n", b"QQ== 0 1\n", b""])
def test_a_beginning_that_is_neither_tiktoken_s_nor_sentencepiece_s_is_refused(
    tmp_path: Path, data: bytes
) -> None:
    config = {"tokenizer_class": "ChatGLM4Tokenizer"}
    folder = checkpoint(tmp_path, "glm4", tokenizer_model=data, tokenizer_config_json=config)
    assert "tokenizer.model" in refusal(folder)


@pytest.mark.parametrize("listed", [{"9" * 5000: {"content": "x"}}, {"0": {"content": "\ud800"}}])
def test_entries_of_added_tokens_that_no_token_can_have_are_left_out_or_refused(
    trained: Callable[[str], Path], tmp_path: Path, listed: dict[str, Any]
) -> None:
    ranks = b"".join(base64.b64encode(bytes((each,))) + b" %d\n" % each for each in range(256))
    for name, kind, data in (
        ("internlm2", "InternLM2Tokenizer", trained("llama").read_bytes()),
        ("glm4", "ChatGLM4Tokenizer", ranks),
    ):
        config = {"tokenizer_class": kind, "added_tokens_decoder": listed}
        folder = checkpoint(tmp_path, name, tokenizer_model=data, tokenizer_config_json=config)
        assert refusal(folder)


@pytest.mark.parametrize(("token_id", "text"), [("0", "<UNK>"), ("5", "byte?"), ("300", "")])
def test_other_tokens_than_spare_ones_keep_their_names(
    trained: Callable[[str], Path], tmp_path: Path, token_id: str, text: str
) -> None:
    listed = {token_id: {"content": text, "special": True, "normalized": False}}
    config = {"tokenizer_class": "InternLM2Tokenizer", "added_tokens_decoder": listed}
    data = trained("llama").read_bytes()
    folder = checkpoint(tmp_path, "internlm2", tokenizer_model=data, tokenizer_config_json=config)
    assert refusal(folder)


def byte_level_files(folder: Path) -> dict[str, bytes]:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((DOCS / "wire.md").read_text("utf-8").split("\n\n"), trainer)
    backend.model.save(str(folder))
    names = {"vocab_json": "vocab.json", "merges_txt": "merges.txt"}
    return {key: (folder / name).read_bytes() for key, name in names.items()}


@pytest.mark.parametrize("model_type", ["gpt2", "phi", "qwen2"])
def test_vocabulary_and_merges_are_read_as_transformers_does(tmp_path: Path, model_type: str) -> None:
    folder = checkpoint(tmp_path, model_type, **byte_level_files(tmp_path))
    tokenizer = Tokenizer.from_directory(folder)
    truth = transformers.AutoTokenizer.from_pretrained(folder)
    normal = partial(unicodedata.normalize, "NFC") if model_type == "qwen2" else str
    for text in texts():
        assert tokenizer.encode(text, add_special_tokens=True) == truth.encode(text)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == normal(text)
    assert tokenizer.special_tokens["eos_token"] == "<|endoftext|>"


def tekken() -> dict[str, Any]:
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
    return {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "num_vocab_tokens": 258,
            "default_vocab_size": 264,
            "default_num_special_tokens": len(special),
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(data).decode(), "token_str": None}
            for rank, data in enumerate([*(bytes([byte]) for byte in range(256)), b"he", b"hel"])
        ],
        "special_tokens": [
            {"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(special)
        ],
    }


def test_mistral_s_tekken_is_read(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(checkpoint(tmp_path, "mistral", tekken_json=tekken()))
    # Special tokens come first, and every text begins with BOS.
    ids = [1, 6 + 257, *(6 + byte for byte in "lo é".encode())]
    assert tokenizer.encode("hello é", add_special_tokens=True) == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello é"
    assert tokenizer.eos_ids == {2}
    assert tokenizer.encode("[INST]", add_special_tokens=False) == [3]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "tokenizer.json, nor another that has a vocabulary; AutoTokenizer"),
        ({"vocab_json": {"a": 0}}, "nor another that has a vocabulary"),
        ({"tokenizer_model": b"damaged"}, "tokenizer.model is not a sentencepiece model"),
        ({"tokenizer_model": b"\x0a\x05\x0a\x01a\x18\x01" * 2}, "the vocabulary has the same token twice"),
        ({"tokenizer_model": b"\x0a\x03\x0a\x01a\x12\x02\x18\x03"}, "into words or characters"),
        ({"tokenizer_model": b"\x0a\x03\x0a\x01a\x12\x03\xc0\x01\x01"}, "treat_whitespace_as_suffix"),
        ({"tokenizer_model": base64.b64encode(b"a") + b" 0\n"}, "cannot make one of what there is"),
        (
            {"vocab_json": {}, "merges_txt": b"", "tokenizer_config_json": {"tokenizer_class": "NoSuch"}},
            "cannot make one of what there is",
        ),
    ],
)
def test_without_a_vocabulary_that_can_be_read_the_files_are_named(
    tmp_path: Path, files: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(checkpoint(tmp_path, "llama", **files))


def test_a_file_that_needs_sentencepiece_s_library_says_so(
    trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, `transformers` asks for tiktoken."""
    folder = checkpoint(tmp_path, "t5", spiece_model=trained("unigram").read_bytes())
    assert Tokenizer.from_directory(folder).vocab_size >= 700
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr(transformers.utils.import_utils, "is_sentencepiece_available", lambda: False)
    assert "it needs `pip install sentencepiece protobuf`" in refusal(folder)


def test_an_empty_tokenizer_is_not_taken_for_one(tmp_path: Path) -> None:
    """`transformers` creates an empty tokenizer for GPT-2 from unrelated files."""
    assert "finds no vocabulary" in refusal(checkpoint(tmp_path, "gpt2", vocab_txt=b"a\nb\n"))


def test_a_damaged_sentencepiece_model_is_read_or_refused(
    trained: Callable[[str], Path], tmp_path: Path
) -> None:
    data = trained("llama").read_bytes()
    rng = random.Random(7)
    for _ in range(60):
        damaged = bytearray(data[: rng.choice([len(data), rng.randrange(len(data))])])
        for _ in range(rng.choice([1, 4, 100])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        folder = checkpoint(tmp_path, "llama", tokenizer_model=bytes(damaged))
        with contextlib.suppress(ModelLoadError):
            Tokenizer.from_directory(folder).encode("Hello wörld", add_special_tokens=True)
