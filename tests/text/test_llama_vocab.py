"""Tokenizers from GGUF files, against llama.cpp: its test vectors, and the patterns that split text."""

from __future__ import annotations

import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from tests.support.llama_cpp import llama_cpp_source
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.text.gguf_splits import SPLITS, Split
from tgi_asgi.text.gguf_vocab import _END_TEXTS, _OTHER_END_TEXTS
from tgi_asgi.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("llama_cpp")
WITH_VECTORS = (
    "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm",
    "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip
# They split texts as one of the others does; `test_each_name_of_a_pre_tokenizer...` compares all splits.
REPEATED = ("command-r", "deepseek-llm", "phi-3", "qwen35", "refact")
# Its 262,000 tokens take two seconds; test_gguf_vocab.py has a small vocabulary of its kind.
MARKS = {**dict.fromkeys(REPEATED, pytest.mark.models), "gemma-4": pytest.mark.thorough}
WITHOUT_VECTORS = ("baichuan",)
OF_ENCODERS = ("bert-bge", "nomic-bert-moe")
REFUSED = {
    "aquila": ("pre-tokenizer is None", "llama.cpp's default for such files is a guess, with a warning"),
    "gpt-neox": ("pre-tokenizer is None", "as for aquila"),
}
# Pre-tokenizers that llama.cpp knows and this project refuses.
UNKNOWN = {
    "granite-embed-multi-97m": "llama.cpp splits other than the tokenizers of this pattern do",
    "granite-embed-multi-311m": "as gemma4, and no model of it is served",
    "whitespace": "an embedding model",
    "chameleon": "its image tokens are part of the text",
    "gemma4": "no file names it: the kind of the vocabulary identifies it",
    "default": "a guess; llama.cpp warns that it makes answers worse",
}
# Names whose patterns in llama.cpp differ from the model's tokenizer.json.
OTHER_PATTERNS = {
    "kimi-k2": "llama.cpp uses a hand-written function",
    "afmoe": "as for kimi-k2",
    "falcon": "digits are matched among the bytes",
    "deepseek-llm": "digits are separate tokens; no merge joins them, so llama.cpp need not split them",
}


def open_vocabulary(name: str) -> Tokenizer:
    with GgufFile.open(llama_cpp_source() / "models" / f"ggml-vocab-{name}.gguf") as file:
        return Tokenizer.from_gguf(file.metadata)


def vectors(name: str) -> list[tuple[str, list[int]]]:
    """Return the texts and ids that llama.cpp's own test of this vocabulary compares."""
    path = llama_cpp_source() / "models" / f"ggml-vocab-{name}.gguf"
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_name(path.name + ".out").read_text().splitlines()
    if len(texts) > len(lines):
        assert texts.pop() == ""  # after the last separator, which one file lacks
    return [(text, [int(item) for item in line.split()]) for text, line in zip(texts, lines, strict=True)]


def test_every_vocabulary_is_accounted_for() -> None:
    folder = llama_cpp_source() / "models"
    names = {path.stem.removeprefix("ggml-vocab-") for path in folder.glob("*.gguf")}
    assert names == {*WITH_VECTORS, *WITHOUT_VECTORS, *OF_ENCODERS, *REFUSED}
    assert {name for name in names if (folder / f"ggml-vocab-{name}.gguf.inp").exists()} == {
        *WITH_VECTORS, "bert-bge",
    }  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in WITH_VECTORS])
def test_text_becomes_the_ids_of_the_models_own_tokenizer(name: str) -> None:
    tokenizer = open_vocabulary(name)
    for text, ids in vectors(name):
        if name == "qwen35" and not unicodedata.is_normalized("NFC", text):
            continue  # added by hand: the model's tokenizer composes characters, llama.cpp does not
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        prefix = " " if name in ("llama-spm", "phi-3") and text else ""
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == prefix + text


@pytest.mark.parametrize("name", WITHOUT_VECTORS)
def test_a_vocabulary_without_vectors_comes_back_from_its_ids(name: str) -> None:
    tokenizer = open_vocabulary(name)
    for text, _ in vectors("llama-spm"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_word_pieces_are_those_of_bert() -> None:
    tokenizer = open_vocabulary("bert-bge")
    for text, ids in vectors("bert-bge"):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)
    assert tokenizer.encode("a", add_special_tokens=True) == [101, 1037, 102]


def test_a_unigram_vocabulary_reads_as_xlm_roberta() -> None:
    tokenizer = open_vocabulary("nomic-bert-moe")
    # The ids in the documentation of XLM-RoBERTa.
    assert tokenizer.encode("Hello world!", add_special_tokens=True) == [0, 35378, 8999, 38, 2]
    ids = tokenizer.encode("\uff21\u3000B\t c  d", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "A B c d"


def test_damaged_normalisation_rules_are_refused_and_do_not_panic() -> None:
    with GgufFile.open(llama_cpp_source() / "models" / "ggml-vocab-nomic-bert-moe.gguf") as file:
        metadata = dict(file.metadata)
    for name in ("tokens", "scores", "token_type"):  # all 250,000 take a second to build
        metadata[f"tokenizer.ggml.{name}"] = metadata[f"tokenizer.ggml.{name}"][:1000]
    Tokenizer.from_gguf(metadata)
    key = "tokenizer.ggml.precompiled_charsmap"
    good = metadata[key]
    beyond = good.copy()
    beyond[4:8] = [0xFF, 0x7F, 0xFF, 0x7F]  # the root's children are outside
    for damaged in (good[:1000], good[:3], beyond, good.astype("int32")):
        with pytest.raises(ModelLoadError, match="charsmap"):
            Tokenizer.from_gguf({**metadata, key: damaged})


@pytest.mark.parametrize("name", REFUSED)
def test_a_vocabulary_that_cannot_be_served_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelLoadError, match=REFUSED[name][0]):
        open_vocabulary(name)


def unescape(literal: str) -> str:
    """Return the text that the inside of a C++ string literal stands for."""
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "r": "\r"}.get(match[1], match[1]), literal)


def patterns_by_type(source: str) -> dict[str, list[str]]:
    """Return each type's patterns, read from the switch in llama.cpp's source.

    If a comment quotes the pattern of the model's tokenizer.json, that pattern is used instead.
    """
    result: dict[str, list[str]] = {}
    types, patterns, quoted = [], [], None
    switch = source[source.index("struct llm_tokenizer_bpe ") :]
    for line in switch[: switch.index("default:")].splitlines():
        literal = re.search(r'"((?:[^"\\]|\\.)*)"(?= *(,|$|//))', line)
        if match := re.search(r"case LLAMA_VOCAB_PRE_TYPE_(\w+):", line):
            types.append(match[1])
        elif literal and "//" in line[: literal.start()]:
            quoted = unescape(literal[1])
        elif literal:
            patterns.append(quoted or unescape(literal[1]))
            quoted = None
        elif "break;" in line:
            result |= dict.fromkeys(types, patterns)
            types, patterns, quoted = [], [], None
    return result


def settings_by_name(source: str) -> dict[str, tuple[str, bool, bool]]:
    """Return the settings of each pre-tokenizer: type, whether merges are ignored, whether BOS is added."""
    result = {}
    start = source.index('tokenizer_pre == "default"')
    for block in source[start:].split("} else if (")[:100]:
        kind = re.search(r"pre_type = LLAMA_VOCAB_PRE_TYPE_(\w+);", block)
        for name in re.findall(r'tokenizer_pre == "([^"]+)"', block):
            assert kind is not None
            result[name] = (kind[1], "ignore_merges = true" in block, "add_bos = true" in block)
    return result


def texts_to_cut() -> list[str]:
    rng = random.Random(3)
    parts = [
        *"aZé1٣½ \t\n\r.,!'/|(中あ한กĀǅʰ\u0301😀~-",
        "  ",
        "\r\n",
        "'ll",
        "'LL",
        "McDo",
        "2024",
        "\u3000",
    ]
    texts = ["".join(rng.choices(parts, k=rng.randrange(1, 30))) for _ in range(300)]
    return texts + [text for text, _ in vectors("qwen35")]


def cut(pre_tokenizer: Any, text: str) -> list[tuple[int, int]]:
    return [span for _, span in pre_tokenizer.pre_tokenize_str(text)]


def test_each_name_of_a_pre_tokenizer_means_what_llama_cpp_takes_it_for() -> None:
    source = Path(llama_cpp_source() / "src" / "llama-vocab.cpp").read_text()
    patterns, names = patterns_by_type(source), settings_by_name(source)
    assert names.keys() - SPLITS.keys() == UNKNOWN.keys() and SPLITS.keys() <= names.keys()
    texts = texts_to_cut()
    cuts: dict[str, list[Any]] = {}
    compared: set[tuple[str, Split]] = set()
    for name, split in SPLITS.items():
        kind, ignores_merges, adds_bos = names[name]
        assert (split.ignores_merges, split.adds_bos) == (ignores_merges, adds_bos), name
        if name in OTHER_PATTERNS or not split.is_byte_level or (kind, split) in compared:
            continue
        compared.add((kind, split))
        if kind not in cuts:
            steps = [pre_tokenizers.Split(Regex(item), behavior="isolated") for item in patterns[kind]]
            cuts[kind] = [cut(pre_tokenizers.Sequence(steps), text) for text in texts]
        ours = split.pre_tokenizer()
        for text, expected in zip(texts, cuts[kind], strict=True):
            assert cut(ours, text) == expected, (name, text)


def test_every_token_that_ends_an_answer_in_llama_cpp_does_here() -> None:
    source = (llama_cpp_source() / "src" / "llama-vocab.cpp").read_text()
    ends = source[source.index("special_eog_ids.clear()") : source.index("is not marked as EOG")]
    texts = set(re.findall(r't\.first == "([^"]+)"', ends))
    for kind in ("FIM_PAD", "FIM_REP", "FIM_SEP"):
        section = source[source.index(f"// find {kind} token") :]
        section = section[section.index("t.first") : section.index(") {", section.index("t.first"))]
        texts |= set(re.findall(r't\.first == "([^"]+)"', section))
    assert len(texts) >= 30 and texts <= _END_TEXTS | _OTHER_END_TEXTS
