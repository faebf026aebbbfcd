"""The tokenizer, on the demonstration model's own vocabulary.

A thousand recorded strings check its ids: `record_tokens.py` encoded them with llama.cpp and with
transformers' conversion of the same GGUF file, and kept those on which the two agree.
"""

from __future__ import annotations

import json
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from tgi_asgi.errors import InvalidRequest, ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.text.tokenizer import Tokenizer

RECORDED = Path(__file__).parent / "data" / "smollm2_tokens.json"


@pytest.fixture(scope="module")
def tokenizer(demo_gguf: Path) -> Tokenizer:
    with GgufFile.open(demo_gguf) as file:
        return Tokenizer.from_gguf(file.metadata)


@pytest.fixture(scope="module")
def recorded() -> list[tuple[str, list[int]]]:
    return [(text, ids) for text, ids in json.loads(RECORDED.read_text("utf-8"))]


@pytest.fixture
def model_dir(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """Return a directory with the same vocabulary as a tokenizer.json, without configuration."""
    tokenizer._backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def complete(tokenizer: Tokenizer, recorded: list[tuple[str, list[int]]]) -> list[tuple[str, list[int]]]:
    """Leave out strings with bytes that no token has (0x04 is one): this and other tokenizers drop them."""
    known = {byte for token_id in range(tokenizer.vocab_size) for byte in tokenizer.token_bytes(token_id)}
    kept = [(text, ids) for text, ids in recorded if set(text.encode()) <= known]
    assert len(kept) > 900
    return kept


def write(path: Path, value: Any) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def test_a_thousand_strings_have_the_ids_that_others_give_them(
    tokenizer: Tokenizer, recorded: list[tuple[str, list[int]]]
) -> None:
    assert len(recorded) == 1000
    for text, ids in recorded:
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)


def test_the_same_vocabulary_as_tokenizer_json_gives_the_same_ids(
    model_dir: Path, recorded: list[tuple[str, list[int]]]
) -> None:
    again = Tokenizer.from_directory(model_dir)
    for text, ids in recorded[::10]:
        assert again.encode(text, add_special_tokens=True) == ids, repr(text)


def test_the_bytes_of_a_texts_tokens_are_the_text(
    tokenizer: Tokenizer, recorded: list[tuple[str, list[int]]]
) -> None:
    for text, ids in complete(tokenizer, recorded):
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode(), repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text, repr(text)


def test_offsets_are_byte_ranges_of_the_text(
    tokenizer: Tokenizer, recorded: list[tuple[str, list[int]]]
) -> None:
    for text, ids in complete(tokenizer, recorded):
        data = text.encode()
        spans = list(tokenizer.encode_with_offsets(text, add_special_tokens=False))
        assert [token_id for token_id, _, _ in spans] == ids
        for token_id, start, stop in spans:
            # A token that is part of a character covers the whole character.
            assert tokenizer.token_bytes(token_id) in data[start:stop], (text, token_id)
            data[start:stop].decode()  # spans never cut a character


def test_special_tokens_are_parsed_and_known(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>", add_special_tokens=False)
    assert ids[0] == tokenizer.bos_id == 1 and ids[-1] == tokenizer.eos_id == 2
    assert {0, 1, 2} <= tokenizer.special_ids and ids[1] not in tokenizer.special_ids
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.eos_ids == {0, 2, 4}  # <|endoftext|> and <reponame> also end a text, as in llama.cpp
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"
    assert not tokenizer.adds_bos
    assert tokenizer.token_text(2) == "<|im_end|>"


def test_a_tokenizer_in_another_process_gives_the_same(
    tokenizer: Tokenizer, recorded: list[tuple[str, list[int]]]
) -> None:
    found = pickle.loads(pickle.dumps(tokenizer))
    for text, ids in recorded[::20]:
        assert found.encode(text, add_special_tokens=False) == ids
    assert (found.eos_ids, found.special_tokens) == (tokenizer.eos_ids, tokenizer.special_tokens)


def test_an_incomplete_character_is_shown_as_such(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U000130b8", add_special_tokens=False)
    assert len(ids) > 1 and "\ufffd" in tokenizer.token_text(ids[0])


def test_an_id_without_a_token_has_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert tokenizer.token_bytes(49152) == b""
    assert tokenizer.decode([49152], skip_special_tokens=False) == ""
    assert tokenizer.piece(49152) is None


def test_pieces_are_written_as_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello world<|im_end|>", add_special_tokens=False)
    assert [tokenizer.piece(token_id) for token_id in ids] == ["Hello", "Ġworld", "<|im_end|>"]


def test_text_that_is_no_unicode_is_refused(tokenizer: Tokenizer) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(InvalidRequest, match="surrogate"):
            encode("a\ud800", add_special_tokens=False)


def test_encoding_lets_other_threads_run(tokenizer: Tokenizer) -> None:
    text = "Many words, and more of them. " * 20_000
    waits, go_on, ran = threading.Event(), threading.Event(), []

    def run() -> None:
        waits.set()
        go_on.wait()
        ran.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    waits.wait()
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # no thread is forced to release the GIL: encoding must do so itself
    try:
        go_on.set()
        ran_before = list(ran)
        tokenizer.encode(text, add_special_tokens=False)
        ran_meanwhile = list(ran)
    finally:
        sys.setswitchinterval(interval_s)
    thread.join()
    assert (ran_before, ran_meanwhile) == ([], [True])


@pytest.fixture(scope="module")
def first_tokens(tokenizer: Tokenizer) -> str:
    """Return a tokenizer.json with the special tokens, the bytes and the first merges: 512 tokens."""
    state = json.loads(tokenizer._backend.to_str())
    model, vocab = state["model"], state["model"]["vocab"]
    model["vocab"] = {text: token_id for text, token_id in vocab.items() if token_id < 512}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    return json.dumps(state)


class TestConfiguration:
    """Of the first tokens of the vocabulary: all 49,152 take a third of a second each time they are read."""

    @pytest.fixture
    def model_dir(self, first_tokens: str, tmp_path: Path) -> Path:
        """Return a directory with these tokens."""
        write(tmp_path / "tokenizer.json", first_tokens)
        return tmp_path

    def test_generation_config_says_what_ends_an_answer(self, model_dir: Path) -> None:
        write(model_dir / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
        write(model_dir / "config.json", {"eos_token_id": None, "text_config": {"eos_token_id": [5]}})
        assert Tokenizer.from_directory(model_dir).eos_ids == {2, 5}
        write(model_dir / "config.json", {"eos_token_id": 7, "text_config": {"eos_token_id": [5]}})
        assert Tokenizer.from_directory(model_dir).eos_ids == {2, 7}
        write(model_dir / "generation_config.json", {"eos_token_id": [0, 3, 10**9]})
        assert Tokenizer.from_directory(model_dir).eos_ids == {0, 2, 3}
        write(model_dir / "generation_config.json", {"eos_token_id": 4})
        assert Tokenizer.from_directory(model_dir).eos_ids == {2, 4}

    def test_named_tokens_come_as_strings_or_objects(self, model_dir: Path) -> None:
        named = {"bos_token": {"content": "<|im_start|>"}, "pad_token": None, "eos_token": "<|im_end|>"}
        write(model_dir / "tokenizer_config.json", named)
        tokenizer = Tokenizer.from_directory(model_dir)
        assert tokenizer.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)

    def test_a_special_tokens_map_counts_beside_a_list_of_no_added_tokens(self, model_dir: Path) -> None:
        named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        write(model_dir / "special_tokens_map.json", {"eos_token": {"content": "<|im_start|>"}})
        listed: dict[str, object] = {**named, "added_tokens_decoder": {}}
        for config, eos_id in ((named, 1), (listed, 2)):
            write(model_dir / "tokenizer_config.json", config)
            assert Tokenizer.from_directory(model_dir).eos_id == eos_id

    def test_bos_is_added_where_tokenizer_json_says_so(self, model_dir: Path) -> None:
        config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        write(model_dir / "tokenizer_config.json", {**config, "add_bos_token": True})
        assert not Tokenizer.from_directory(model_dir).adds_bos  # as in transformers
        backend = Backend.from_file(str(model_dir / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
        backend.save(str(model_dir / "tokenizer.json"))
        write(model_dir / "tokenizer_config.json", {**config, "add_bos_token": False})
        tokenizer = Tokenizer.from_directory(model_dir)
        assert tokenizer.adds_bos
        plain = tokenizer.encode("a", add_special_tokens=False)
        assert tokenizer.encode("a", add_special_tokens=True) == [1, *plain]

    @pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer"])
    def test_flags_say_what_surrounds_a_text_in_classes_that_once_did_so(
        self, model_dir: Path, kind: str
    ) -> None:
        """As transformers 4 and TGI did; transformers 5 ignores the flags beside a tokenizer.json."""
        named = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "tokenizer_class": kind}

        def around(**flags: Any) -> tuple[list[int], list[int]]:
            write(model_dir / "tokenizer_config.json", named | flags)
            tokenizer = Tokenizer.from_directory(model_dir)
            (plain,) = tokenizer.encode("a", add_special_tokens=False)
            ids = tokenizer.encode("a", add_special_tokens=True)
            assert tokenizer.adds_bos == (ids[0] == tokenizer.bos_id)
            return ids[: ids.index(plain)], ids[ids.index(plain) + 1 :]

        assert around() == ([], [])  # transformers 5 writes no flags: tokenizer.json has the final say
        assert around(add_bos_token=True) == ([1], [])
        assert around(add_eos_token=True) == ([1], [2])
        assert around(add_bos_token=False, add_eos_token=True) == ([], [2])
        assert around(add_bos_token=True, tokenizer_class="PreTrainedTokenizerFast") == ([], [])
        backend = Backend.from_file(str(model_dir / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
        backend.save(str(model_dir / "tokenizer.json"))
        assert around(add_bos_token=False) == ([], [])
        assert around(add_bos_token=True) == ([1], [])
        assert around(bos_token=None, add_eos_token=False) == ([1], [])  # nothing to add: left as it is

    def test_tokens_that_only_the_configuration_has_are_added(self, model_dir: Path) -> None:
        added = {
            "513": {"content": "<tool>", "special": False},
            "512": {"content": "<think>", "special": True},
        }
        write(model_dir / "tokenizer_config.json", {"added_tokens_decoder": added, "eos_token": "<stop>"})
        tokenizer = Tokenizer.from_directory(model_dir)
        assert tokenizer.encode("<think><tool><stop>", add_special_tokens=False) == [512, 513, 514]
        assert tokenizer.special_ids >= {512, 514} and 513 not in tokenizer.special_ids
        assert tokenizer.eos_id == 514
        assert tokenizer.token_bytes(513) == b"<tool>"

    def test_tokens_of_an_older_list_are_added_as_transformers_does(self, model_dir: Path) -> None:
        """Of fine-tunes that kept the base model's tokenizer.json; a token that it has keeps its flags."""
        write(model_dir / "added_tokens.json", {"<tool>": 512, "<|im_end|>": 2})
        tokenizer = Tokenizer.from_directory(model_dir)
        reference = transformers.AutoTokenizer.from_pretrained(model_dir)
        for text in ("a<tool>b", "a<|im_end|>"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert ids == reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode("<tool>", add_special_tokens=False) == [512]
        assert 2 in tokenizer.special_ids and 512 not in tokenizer.special_ids
        write(model_dir / "added_tokens.json", {"<tool>": 50000})
        with pytest.raises(ModelLoadError, match="should have the id 50000, and has 512"):
            Tokenizer.from_directory(model_dir)

    def test_named_tokens_of_a_model_are_special_and_the_template_s(self, model_dir: Path) -> None:
        config = {
            "image_token": "<|im_end|>", "audio_token": "<not there>", "add_bos_token": False,
            "extra_special_tokens": {"boi_token": "<repo_name>"},
        }  # fmt: skip
        write(model_dir / "tokenizer_config.json", config)
        tokenizer = Tokenizer.from_directory(model_dir)
        assert tokenizer.special_tokens == {"image_token": "<|im_end|>", "boi_token": "<repo_name>"}
        assert tokenizer.vocab_size == 512
        template = ChatTemplate("{{ image_token }}{{ boi_token }}{{ audio_token }}", tokenizer.special_tokens)
        assert template.render([], add_generation_prompt=False) == "<|im_end|><repo_name>"

    def test_truncation_and_padding_of_the_file_are_ignored(self, model_dir: Path) -> None:
        backend = Backend.from_file(str(model_dir / "tokenizer.json"))
        backend.enable_truncation(4)
        backend.enable_padding(length=32)
        backend.save(str(model_dir / "tokenizer.json"))
        tokenizer = Tokenizer.from_directory(model_dir)
        assert len(tokenizer.encode("a b c d e f g h", add_special_tokens=True)) == 8

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("tokenizer.json", "{}", "is not a tokenizer"),
            ("tokenizer.json", "\0", "is not a tokenizer"),
            ("tokenizer_config.json", "[]", "expected a JSON object"),
            ("tokenizer_config.json", "{", "not valid JSON"),
            ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}, "is damaged"),
            ("tokenizer_config.json", {"added_tokens_decoder": {"1": "y"}}, "is damaged"),
            ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}, "is damaged"),
            ("generation_config.json", "nonsense", "not valid JSON"),
        ],
    )
    def test_damaged_files_are_named(self, model_dir: Path, name: str, content: Any, reason: str) -> None:
        write(model_dir / name, content)
        with pytest.raises(ModelLoadError, match=rf"{name}.*{reason}|{reason}.*{name}|{name} of .*{reason}"):
            Tokenizer.from_directory(model_dir)

    def test_a_directory_without_tokenizer_json_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match=r"no such file: .*tokenizer\.json"):
            Tokenizer.from_directory(tmp_path)

    def test_a_vocabulary_of_another_family_is_refused(self, tmp_path: Path) -> None:
        backend = Backend(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
        backend.decoder = decoders.BPEDecoder()
        backend.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ModelLoadError, match=r"decoder \(BPEDecoder\) is not supported"):
            Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("has_types", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_pair_loses_of_its_second_text_what_tokenizers_cuts(has_types: bool, side: str) -> None:
    words = {word: at for at, word in enumerate(["[CLS]", "[SEP]", "a", "b", "c", "d"])}
    backend = Backend(models.WordPiece(words, unk_token="[CLS]"))
    backend.decoder = decoders.WordPiece()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    second = int(has_types)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )
    tokenizer = Tokenizer(Backend.from_str(backend.to_str()), {})
    texts = ("a b", "c d d c d")
    whole = backend.encode(*texts).ids
    for keep in range(6, 13):
        backend.enable_truncation(keep, strategy="only_second", direction=side)
        wanted = backend.encode(*texts)
        ids, start = tokenizer.encode_pair(*texts, keep=keep, from_left=side == "left")
        assert ids == wanted.ids
        assert start == (4 if has_types else None)
    assert tokenizer.encode_pair(*texts, keep=None)[0] == whole
    assert tokenizer.encode_pair(*texts, keep=2)[0] == [0, 2, 3, 1, 1]


@pytest.mark.parametrize(
    ("config", "start"),
    [
        ({}, 2),
        ({"tokenizer_class": "BertTokenizer"}, 2),
        ({"tokenizer_class": "TokenizersBackend"}, None),
        ({"tokenizer_class": "TokenizersBackend", "model_input_names": ["input_ids", "token_type_ids"]}, 2),
        ({"tokenizer_class": "BertTokenizer", "model_input_names": ["input_ids", "attention_mask"]}, None),
    ],
)
def test_token_types_are_given_where_transformers_gives_them(
    tmp_path: Path, config: dict[str, Any], start: int | None
) -> None:
    backend = Backend(models.WordLevel({"[SEP]": 0, "a": 1, "b": 2}, unk_token="[SEP]"))
    backend.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B:1 [SEP]:1", special_tokens=[("[SEP]", 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", config)
    assert Tokenizer.from_directory(tmp_path).encode_pair("a", "b", keep=None) == ([1, 0, 2, 0], start)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_sentence_transformers_may_lower_the_case_of_texts(
    first_tokens: str, tmp_path: Path, kind: str
) -> None:
    write(tmp_path / "tokenizer.json", first_tokens)
    tokenizer = Tokenizer.from_directory(tmp_path)
    for given, text in ((False, "HELLO There"), (True, "hello there")):
        write(tmp_path / f"sentence_{kind}_config.json", {"do_lower_case": given})
        found = Tokenizer.from_directory(tmp_path).encode("HELLO There", add_special_tokens=False)
        assert found == tokenizer.encode(text, add_special_tokens=False)


def sentencepiece(*steps: Any) -> Any:
    return decoders.Sequence([*steps, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


@pytest.mark.parametrize(
    ("decoder", "pieces", "text"),
    [
        (decoders.Metaspace(), ["\u2581a", "b", "\u2581c", "_d"], "ab c_d"),
        (decoders.Metaspace(replacement="_"), ["_a", "b", "_c", "\u2581d"], "ab c\u2581d"),
        (sentencepiece(decoders.Replace("_", " ")), ["_a", "b", "_c", "\u2581d"], "ab c\u2581d"),
        (sentencepiece(decoders.Replace(Regex("[_~]"), " ")), ["_a", "b", "~c", "<0x64>"], "ab cd"),
        (
            sentencepiece(decoders.Replace("_", " "), decoders.Replace("~", "-")),
            ["_a", "~b", "c", "d"],
            "a-bcd",
        ),
        (decoders.WordPiece(cleanup=False), ["a", "##b", "c", "@@d"], "ab c @@d"),
        (decoders.WordPiece(prefix="@@", cleanup=False), ["a", "@@b", "c", "##d"], "ab c ##d"),
        (None, ["a", "b", "##c"], "a b ##c"),
    ],
)
def test_a_stream_has_the_decoder_s_marks_of_spaces_and_pieces(
    decoder: Any, pieces: list[str], text: str
) -> None:
    backend = Backend(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token=pieces[0]))
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = Tokenizer(backend, {})
    ids = range(len(pieces))
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == f" {text}"


def test_characters_are_joined_without_spaces() -> None:
    backend = Backend(models.WordLevel({"a": 0, " ": 1, "é": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = Tokenizer(backend, {})
    ids = tokenizer.encode("é aa", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "é aa"
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "é aa"
