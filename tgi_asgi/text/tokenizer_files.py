"""Reads a checkpoint's tokenizer: tokenizer.json and the configuration files next to it, as in transformers.

Without tokenizer.json, the older vocabulary files are read (`older_files.py`). Called by `tokenizer.py`;
`gguf_vocab.py` does the same for GGUF files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import MAX_JSON_BYTES, read_file, read_optional_json
from tgi_asgi.text import older_files

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Older versions of sentence-transformers wrote the model's kind into the name.
_SENTENCE_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_ADDED_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a checkpoint's files say of its tokenizer.

    Attributes:
        special_tokens: "bos_token", "image_token" ... -> text.
        eos_ids: The tokens that end an answer, besides the tokenizer's own `eos_token`.
        has_token_types: Whether the model is told which segment of a pair a token belongs to.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    eos_ids: list[int]
    has_token_types: bool


def read_tokenizer(directory: Path, model_directory: Path) -> TokenizerFiles:
    """Read a directory.

    Args:
        model_directory: Directory with the model's own configuration; often the same.

    Raises:
        ModelLoadError: if there is no vocabulary, or a file is damaged.
    """
    config = _read_config(directory)
    path = directory / "tokenizer.json"
    ends: list[str] = []  # besides the named one, by the model's own code
    if path.exists():
        backend, listed = _read_backend(path), {}
        if "added_tokens_decoder" not in config:
            listed = config["added_tokens_decoder"] = older_files.missing_tokens(backend, directory)
    else:
        backend, added = older_files.make_backend(directory, config)
        ends = [added["eot_token"]] if "eot_token" in added else []
        config = {**added, **config}
        listed = config.get("added_tokens_decoder") or {}
    if read_sentence_config(model_directory).get("do_lower_case") is True:
        _lower_texts(backend)
    named = {name: text for name in _NAMED if (text := _text_of(config.get(name)))}
    named.update(_model_specific(backend, config))
    try:
        _add_missing(backend, config.get("added_tokens_decoder") or {}, named)
        _add_unnamed(backend, config)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelLoadError(f"the tokenizer_config.json of {path} is damaged: {error}") from error
    older_files.surround_by_flags(backend, config)
    older_files.check_ids(backend, listed)
    inputs = config.get("model_input_names")  # the tokenizer's outputs that the model gets
    is_plain = config.get("tokenizer_class") == "TokenizersBackend"  # of transformers 5: no types by default
    has_token_types = "token_type_ids" in inputs if isinstance(inputs, list) else not is_plain
    end_ids = [token_id for text in ends if (token_id := backend.token_to_id(text)) is not None]
    return TokenizerFiles(backend, named, [*_read_eos_ids(model_directory), *end_ids], has_token_types)


def _read_eos_ids(directory: Path) -> list[int]:
    """Return the end tokens of generation_config.json, or else of config.json or its text part."""
    model = read_optional_json(directory / "config.json")
    generation = read_optional_json(directory / "generation_config.json")
    files = (generation, model, model.get("text_config"))
    given = (file.get("eos_token_id") for file in files if isinstance(file, dict))
    found = next((each for each in given if each is not None), None)
    return [item for item in (found if isinstance(found, list) else [found]) if type(item) is int]


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    data = read_file(path, MAX_JSON_BYTES)
    try:
        return tokenizers.Tokenizer.from_buffer(data.tobytes())
    except Exception as error:  # `tokenizers` raises a bare Exception
        raise ModelLoadError(f"{path} is not a tokenizer: {error}") from error


def _lower_texts(backend: tokenizers.Tokenizer) -> None:
    """Lower the case of texts before all else, as sentence-transformers does if its files say so."""
    kinds = tokenizers.normalizers
    own: Any = backend.normalizer
    is_several = isinstance(own, kinds.Sequence)
    parts = list(own) if is_several else [own] if own is not None else []
    if not any(isinstance(part, kinds.Lowercase) for part in parts):
        backend.normalizer = kinds.Sequence([kinds.Lowercase(), *parts])


def read_sentence_config(directory: Path) -> dict[str, Any]:
    """Return how sentence-transformers tokenises; {} if no file says it."""
    return next(filter(None, (read_optional_json(directory / name) for name in _SENTENCE_FILES)), {})


def _read_config(directory: Path) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json.

    If it is so old that it lists no added tokens, what special_tokens_map.json says replaces its own, as in
    `transformers`.
    """
    config = read_optional_json(directory / "tokenizer_config.json")
    is_older = "added_tokens_decoder" not in config
    return {**config, **read_optional_json(directory / "special_tokens_map.json")} if is_older else config


def _text_of(token: Any) -> str | None:
    """Return the text of a token as configurations write it: a string or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _model_specific(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the further named tokens that the vocabulary has, such as `image_token`.

    They are special, and variables of the chat template, as in transformers.
    """
    extra = config.get("extra_special_tokens")
    given = {name: value for name, value in config.items() if name.endswith("_token") and name not in _NAMED}
    given.update(extra if isinstance(extra, dict) else {})
    texts = {name: text for name, value in given.items() if (text := _text_of(value))}
    return {name: text for name, text in texts.items() if backend.token_to_id(text) is not None}


def _add_missing(backend: tokenizers.Tokenizer, listed: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Add the configuration's tokens that tokenizer.json lacks or has with other flags.

    `listed` is `added_tokens_decoder`: id -> token. Named tokens (BOS, EOS, ...) are special in any case.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    wanted: dict[str, AddedToken] = {}
    for token_id in sorted(listed, key=int):
        entry = listed[token_id]
        flags = {flag: bool(entry.get(flag, False)) for flag in _ADDED_FLAGS}
        wanted[entry["content"]] = AddedToken(entry["content"], **flags)
    for text in named.values():
        token = wanted.get(text) or known.get(text) or AddedToken(text, normalized=False)
        flags = {flag: getattr(token, flag) for flag in _ADDED_FLAGS}
        wanted[text] = AddedToken(text, **{**flags, "special": True})
    for text, token in wanted.items():
        if known.get(text) != token:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _add_unnamed(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Make special what the configuration lists without a name, unless it is an added token already."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        given = config.get(key)
        texts = [_text_of(each) for each in given] if isinstance(given, list) else []
        backend.add_special_tokens(
            [AddedToken(text, normalized=False) for text in texts if text is not None and text not in known]
        )
