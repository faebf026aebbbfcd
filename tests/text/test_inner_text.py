"""Text inside an answer, on vocabularies that change whole texts: a space before, or other characters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tests.support.llama_cpp import llama_cpp_source
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.grammar import Mask
from tgi_asgi.text.constrain.source import GrammarSource
from tgi_asgi.text.gguf_vocab import build
from tgi_asgi.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("llama_cpp")
TEXTS = [
    '{"a": [1, true]}',
    " yes", "no ", "a  b", "   ", "x", "def f():\n    return 1", "naïve café", "ﬁx", "e\u0301",
    "Ⅳ A", "UPPER", "日本", "😀", "<s>", "</s>[INST]", "▁", "",
]  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
GRAMMARS: dict[str, tuple[GrammarSource, str]] = {
    "object": (sources.any_object(), '{"b":"é"}'),
    "schema": (sources.json_schema({**SCHEMA, "additionalProperties": False}), '{"a":12}'),
    "choice": (sources.choice(["yes", "no"]), "yes"),
    "later": (sources.regex("[a-z]{3}: yes!"), "abc: yes!"),
    "characters": (sources.choice(["ﬁx", "cafe\u0301"]), "cafe\u0301"),
}


PREFIX = "tokenizer.ggml."
# How many tokens remain of a vocabulary's beginning and end, where its bytes, letters and special tokens are.
KEPT = {"gpt-2": (4000, 1), "llama-spm": (4000, 2200)}


def of_gguf(name: str, *, is_whole: bool = False, **changes: object) -> tokenizers.Tokenizer:
    """Return a vocabulary, or a part of it: how it changes texts does not depend on the number of tokens."""
    with GgufFile.open(llama_cpp_source() / "models" / f"ggml-vocab-{name}.gguf") as file:
        metadata = {**file.metadata, **{f"{PREFIX}{key}": value for key, value in changes.items()}}
    if name in KEPT and not is_whole:
        first, last = KEPT[name]
        tokens = [*metadata[f"{PREFIX}tokens"][:first], *metadata[f"{PREFIX}tokens"][-last:]]
        known = set(tokens)
        pairs = [merge.split(" ") for merge in metadata.get(f"{PREFIX}merges", ())]
        merges = [" ".join(pair) for pair in pairs if known.issuperset((*pair, "".join(pair)))]
        metadata |= {f"{PREFIX}tokens": tokens, f"{PREFIX}merges": merges}
        for key in {f"{PREFIX}scores", f"{PREFIX}token_type"} & metadata.keys():
            metadata[key] = np.delete(metadata[key], slice(first, -last))
    return build(metadata).backend


def metaspace() -> tokenizers.Tokenizer:
    """Return Llama's vocabulary as transformers 4.40 and later write it."""
    made = of_gguf("llama-spm")
    made.normalizer = normalizers.Sequence([])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


def byte_level(
    normalizer: normalizers.Normalizer | None, *, has_prefix: bool = False
) -> Callable[[], tokenizers.Tokenizer]:
    def make() -> tokenizers.Tokenizer:
        made = of_gguf("gpt-2")
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix)
        if normalizer is not None:
            made.normalizer = normalizer
        return made

    return make


VOCABULARIES: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "llama-spm": lambda: of_gguf("llama-spm"),
    "phi-3": lambda: of_gguf("phi-3"),
    "baichuan": lambda: of_gguf("baichuan"),
    "llama-spm, no prefix": lambda: of_gguf("llama-spm", add_space_prefix=False),
    "gemma-4": lambda: of_gguf("gemma-4"),
    "metaspace": metaspace,
    "byte-level": byte_level(None),
    "byte-level, prefix": byte_level(None, has_prefix=True),
    "byte-level, NFC": byte_level(normalizers.NFC()),
    "byte-level, NFKC": byte_level(normalizers.NFKC()),
    "byte-level, lowercase": byte_level(normalizers.Lowercase()),
}


THOROUGH = ("phi-3", "baichuan", "byte-level, prefix", "byte-level, NFKC")  # like one of the others each
# Gemma's vocabulary is as Llama's without a prefix, and has eight times as many tokens.
MARKS = {**dict.fromkeys(THOROUGH, pytest.mark.thorough), "gemma-4": pytest.mark.models}


def allowed(mask: Mask) -> list[int]:
    return [int(i) for i in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=MARKS.get(name, ())) for name in VOCABULARIES],
)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    backend = VOCABULARIES[request.param]()
    end = next(text for text in ("</s>", "<eos>", "<|endoftext|>") if backend.token_to_id(text) is not None)
    return Tokenizer(backend, {"eos_token": end})


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_have_exactly_the_text_s_bytes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_inside(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.special_ids.isdisjoint(ids)


def test_ids_are_those_of_the_text_within_a_longer_one() -> None:
    """Nothing merges with Llama's token for a line break, so the text after it is split as on its own."""
    tokenizer = Tokenizer(of_gguf("llama-spm", is_whole=True), {"eos_token": "</s>"})
    for text in ('{"name": "', "yes", " yes", "def f(x):", "Zürich"):
        around = tokenizer.encode("x\n" + text, add_special_tokens=False)
        assert tokenizer.encode_inside(text) == around[2:]
        assert tokenizer.encode(text, add_special_tokens=False) != around[2:], "the vocabulary adds nothing"


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "decoder"),
    [
        (normalizers.Prepend("▁"), None, decoders.Metaspace()),
        (normalizers.Sequence([normalizers.Prepend("▁")]), None, decoders.Metaspace()),
        (None, pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace()),
        (None, pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()),
    ],
    ids=["prepend", "prepend in a sequence", "metaspace", "byte-level"],
)
def test_the_merges_decide_though_the_vocabulary_puts_a_space_before_texts(
    normalizer: normalizers.Normalizer | None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None,
    decoder: decoders.Decoder,
) -> None:
    """The longest tokens of "abc" are "ab" and "c", but "b" and "c" are merged first."""
    vocab = {text: token_id for token_id, text in enumerate(["▁", "Ġ", "a", "b", "c", "bc", "ab"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("b", "c"), ("a", "b")]))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    tokenizer = Tokenizer(backend, {})
    assert tokenizer.encode("abc", add_special_tokens=False)[-2:] == [vocab["a"], vocab["bc"]]
    assert tokenizer.encode_inside("abc") == [vocab["a"], vocab["bc"]]


@pytest.mark.parametrize("name", GRAMMARS)
def test_grammars_compile_and_lead_to_their_texts(
    tokenizer: Tokenizer, compiler: GrammarCompiler, name: str
) -> None:
    """Each token is among those that the mask allows, which are few where the grammar leaves no choice."""
    source, text = GRAMMARS[name]
    matcher = compiler.compile(source).matcher()
    mask = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    data = text.encode()
    while data:
        matcher.fill_mask(mask)
        tokens = [(token_id, tokenizer.token_bytes(token_id)) for token_id in allowed(mask)]
        fitting = [(token_id, part) for token_id, part in tokens if part and data.startswith(part)]
        assert fitting, f"no token is allowed that goes on with {data!r}"
        token_id, part = max(fitting, key=lambda each: len(each[1]))
        matcher.accept(token_id)
        assert matcher.error is None
        data = data[len(part) :]
    matcher.fill_mask(mask)
    assert matcher.is_ended or not tokenizer.eos_ids.isdisjoint(allowed(mask))
    assert matcher.error is None


def test_an_end_token_beyond_the_model_s_vocabulary_is_not_used() -> None:
    """Fine-tunes exist that added tokens to the tokenizer, but not to the model."""
    backend = of_gguf("llama-spm")
    size = backend.get_vocab_size()
    backend.add_special_tokens(["<|im_end|>"])
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"}, [size])
    assert tokenizer.eos_ids == {2, size}
    matcher = GrammarCompiler(tokenizer, size).compile(sources.choice(["yes"])).matcher()
    for token_id in tokenizer.encode_inside("yes"):
        matcher.accept(token_id)
    mask = np.zeros(-(-size // 32), np.int32)
    matcher.fill_mask(mask)
    assert matcher.is_ended or allowed(mask) == [2]


def test_runs_of_spaces_that_are_added_tokens_are_spaces() -> None:
    """Gemma's tokenizer.json lists them beside its special tokens."""
    backend = of_gguf("llama-spm")
    backend.add_tokens([tokenizers.AddedToken("\u2581" * 20, normalized=False, special=False)])
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"})
    token_id = backend.token_to_id("\u2581" * 20)
    assert token_id is not None
    assert tokenizer.token_bytes(token_id) == b" " * 20 == backend.decode([9, token_id])[-20:].encode()
