"""Text to token ids and back: one wrapper over `tokenizers` for every vocabulary format.

Built in the loading thread, then used by the HTTP layer's worker threads (`encode`) and by the engine
(`token_bytes`, on the event loop). Knows neither HTTP nor the engine.
"""

from __future__ import annotations

import functools
import re
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken

from tgi_asgi.errors import InvalidRequest, ModelLoadError
from tgi_asgi.formats.files import MAX_JSON_BYTES, read_file, read_optional_json
from tgi_asgi.text import gguf_encoder_vocab, gguf_vocab, older_files
from tgi_asgi.text.chat.guard import PromptGuard
from tgi_asgi.text.inner_text import InnerText
from tgi_asgi.text.token_bytes import token_byte_table

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Older versions of sentence-transformers wrote the model's kind into the name.
_SENTENCE_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_ADDED_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


class Tokenizer:
    """A model's tokenizer.

        tokenizer = Tokenizer.from_directory(Path("/models/llama"))
        ids = tokenizer.encode("Hello", add_special_tokens=True)
        tokenizer.decode(ids, skip_special_tokens=True)          # "Hello"

    All methods may be called from several threads at once.

    Args:
        has_token_types: Whether the model is told which segment of a pair a token belongs to.

    Attributes:
        vocab_size: Ids are in [0, vocab_size); the model's own vocabulary may be padded beyond it.
        special_tokens: "bos_token", "eos_token", "image_token" ... -> text, those that exist; for the chat
            template.
        special_ids: Control tokens, which yield no text unless a request wants them.
        bos_id, eos_id: Ids of these two tokens, or None.
        eos_ids: Every token that ends an answer.
        guard: Keeps special tokens in messages from acting as such; it makes the texts that are `is_marked`.
        longest_token: Upper bound of the characters that a token stands for.
        adds_bos: Whether `encode(..., add_special_tokens=True)` starts with the BOS token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        eos_ids: Iterable[int] = (),
        *,
        has_token_types: bool = True,
    ) -> None:
        # The tokenizer.json files of embedding models contain these; a server sets its own limits.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes = token_byte_table(backend)
        self.guard = PromptGuard(self._added[token_id] for token_id in self.special_ids)
        self._marked_backend: tokenizers.Tokenizer | None = None
        self._acting: dict[int, int] = {}  # marked backend's id of a special token -> the token's own id
        self._inner_text: InnerText | None = None
        self._lock = threading.Lock()
        self.vocab_size = len(self._bytes)
        self.longest_token = max(map(len, self._bytes), default=1)  # in bytes, so no fewer than characters
        if isinstance(backend.model, tokenizers.models.WordPiece):  # an unknown word is one token
            self.longest_token = max(self.longest_token, backend.model.max_input_chars_per_word)
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        known = {token_id for token_id in eos_ids if 0 <= token_id < self.vocab_size}
        self.eos_ids = frozenset(known | ({self.eos_id} if self.eos_id is not None else set()))
        self._has_token_types = has_token_types
        self.adds_bos = self.bos_id in self.encode("", add_special_tokens=True)[:1]

    @classmethod
    def from_directory(cls, directory: Path, model_directory: Path | None = None) -> Tokenizer:
        """Read tokenizer.json and the configuration files next to it, as transformers does.

        If there is none, the older vocabulary files are read (`older_files.py`).

        The tokens that end an answer are those of generation_config.json, or else of config.json or its text
        part, and the tokenizer's own `eos_token`.

        Args:
            model_directory: Directory with those two files, if it is another one.

        Raises:
            ModelLoadError: if there is no vocabulary, or a file is damaged.
        """
        model_directory = model_directory or directory
        config = _read_config(directory)
        model = read_optional_json(model_directory / "config.json")
        generation = read_optional_json(model_directory / "generation_config.json")
        files = (generation, model, model.get("text_config"))
        given = (file.get("eos_token_id") for file in files if isinstance(file, dict))
        eos = next((each for each in given if each is not None), None)
        eos_ids = [item for item in (eos if isinstance(eos, list) else [eos]) if type(item) is int]
        path = directory / "tokenizer.json"
        if path.exists():
            backend, listed = _read_backend(path), {}
            if "added_tokens_decoder" not in config:
                listed = config["added_tokens_decoder"] = older_files.missing_tokens(backend, directory)
        else:
            backend, added = older_files.make_backend(directory, config)
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
        has_token_types = not isinstance(inputs, list) or "token_type_ids" in inputs
        return cls(backend, named, eos_ids, has_token_types=has_token_types)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Rebuild the tokenizer that a GGUF file's metadata describes.

        Raises:
            ModelLoadError: if the vocabulary is absent, damaged, or of a kind that is not supported.
        """
        vocab = gguf_vocab.build(metadata)
        added = {"bos": vocab.adds_bos, "eos": vocab.adds_eos}
        named = {name: vocab.special_tokens.get(f"{name}_token") for name, adds in added.items() if adds}
        if vocab.is_of_encoder:
            gguf_encoder_vocab.surround(vocab.backend, named.get("bos"), named.get("eos"), vocab.separator)
        else:
            parts = {name: text for name, text in named.items() if text is not None}
            older_files.surround(vocab.backend, parts)
        return cls(vocab.backend, vocab.special_tokens, vocab.eos_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling to another process, which rebuilds the tables."""
        state = (self._backend.to_str(), self.special_tokens, self.eos_ids, self._has_token_types)
        return _restored, state

    def encode(self, text: str, *, add_special_tokens: bool, is_marked: bool = False) -> list[int]:
        """Turn text into ids; special tokens in it act as such, but if `is_marked` only after a mark.

        Releases the GIL. Long text belongs in a worker thread: 1 ms encodes about 500 tokens.

        Raises:
            InvalidRequest: if the text has a lone surrogate, which UTF-8 cannot encode.
        """
        # `encode` holds the GIL even in a thread; the batch call does not.
        if is_marked:
            ids = self._encode(self._marked().encode_batch_fast, text, add_special_tokens).ids
            return [self._acting.get(token_id, token_id) for token_id in ids]
        return self._encode(self._backend.encode_batch_fast, text, add_special_tokens).ids

    def encode_inside(self, text: str) -> list[int]:
        """Turn text inside an answer into ids that have exactly its bytes (`inner_text.py`)."""
        with self._lock:
            if self._inner_text is None:
                self._inner_text = InnerText(self._backend, self._bytes, self.special_ids)
        return self._inner_text.encode(text)

    def encode_cut(
        self, text: str, keep: int, *, add_special_tokens: bool, from_left: bool = False
    ) -> list[int]:
        """Turn the beginning or the end of a text into at most `keep` ids; added special tokens are not cut.

        Raises:
            InvalidRequest: as `encode`.
        """
        encoding = self._encode(self._backend.encode_batch_fast, text, False)
        around = self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        encoding.truncate(max(keep - around, 0), direction="left" if from_left else "right")
        if add_special_tokens:
            encoding = self._backend.post_process(encoding, None, True)
        return encoding.ids[:keep]

    def encode_pair(
        self, first: str, second: str, *, keep: int | None = None, from_left: bool = False
    ) -> tuple[list[int], int | None]:
        """Turn two texts into the ids of one pair, with special tokens around and between them.

        Also returns the index at which the second segment begins, for models that have token types; None if
        the tokenizer marks no segments.

        Args:
            keep: Maximum number of ids; the second text is cut, at its end or its beginning, to fit. If
                cutting all of it does not suffice, there are more ids.

        Raises:
            InvalidRequest: as `encode`.
        """
        encoding = self._encode(self._backend.encode_batch_fast, (first, second), True)
        ids = encoding.ids
        types = encoding.type_ids if self._has_token_types else []
        over = 0 if keep is None else len(ids) - keep
        span = _span(encoding.sequence_ids, 1) if over > 0 else None
        if span is not None:
            begin, end = span
            cut = slice(begin, min(begin + over, end)) if from_left else slice(max(end - over, begin), end)
            del ids[cut], types[cut]
        return ids, types.index(1) if 1 in types else None

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool, is_marked: bool = False
    ) -> Iterable[tuple[int, int, int]]:
        """Turn text into (id, start, stop), where the token covers bytes [start, stop) of the text's UTF-8.

        Tokens that share a character all cover the whole of it; added special tokens cover nothing. Marks are
        removed first: offsets refer to the text without them. The tuples are made one at a time, because all
        those of a long text take several times its memory.

        Raises:
            InvalidRequest: as `encode`.
        """
        backend = self._marked() if is_marked else self._backend
        encoding = self._encode(backend.encode_batch, text, add_special_tokens)
        ids, offsets = encoding.ids, encoding.offsets
        if is_marked:
            ids = [self._acting.get(token_id, token_id) for token_id in ids]
            offsets = _without_marks(offsets, text, self.guard.mark)
            text = text.replace(self.guard.mark, "")
        if text.isascii():
            return ((token_id, *span) for token_id, span in zip(ids, offsets, strict=True))
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        at = [0, *np.cumsum(widths).tolist()]
        return ((token_id, at[start], at[stop]) for token_id, (start, stop) in zip(ids, offsets, strict=True))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for within running text (b"" for an id without a token)."""
        return self._bytes[token_id] if token_id < self.vocab_size else b""

    @functools.cached_property
    def drops_first_space(self) -> bool:
        """Whether a text loses the space of its first token's bytes, which the vocabulary has put there."""
        words = (at for at, data in enumerate(self._bytes) if data[:1] == b" " and data[1:2].isalpha())
        first = next(words, None)
        return first is not None and not self.decode([first], skip_special_tokens=True).startswith(" ")

    def token_text(self, token_id: int) -> str:
        """Return a token's text for display: a special token's name, U+FFFD for incomplete characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def piece(self, token_id: int) -> str | None:
        """Return a token as the vocabulary writes it (`Ġworld`); None for an id without a token."""
        return self._backend.id_to_token(token_id)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Turn ids into text; unknown ids yield none. For whole texts; streams use `token_bytes`."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def save(self, path: Path) -> None:
        """Write a tokenizer.json, including what surrounds a text, for other programs to read."""
        self._backend.save(str(path))

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _marked(self) -> tokenizers.Tokenizer:
        """Return a backend that reads special tokens as text unless the mark precedes them.

        Built when a prompt first needs it: the copy takes a quarter of a second (49,000 tokens).
        """
        with self._lock:
            if self._marked_backend is None:
                backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
                backend.encode_special_tokens = True
                known = self._backend.get_added_tokens_decoder()
                for token_id in sorted(self.special_ids):
                    token = known[token_id]
                    flags = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "single_word")}
                    marked = self.guard.mark + token.content
                    backend.add_tokens([AddedToken(marked, normalized=False, special=False, **flags)])
                    new_id = backend.token_to_id(marked)
                    assert new_id is not None
                    self._acting[new_id] = token_id
                self._marked_backend = backend
            return self._marked_backend

    def _encode(
        self, encode_batch: Any, text: str | tuple[str, str], add_special_tokens: bool
    ) -> tokenizers.Encoding:
        try:
            encoding: tokenizers.Encoding = encode_batch([text], add_special_tokens=add_special_tokens)[0]
        except TypeError:  # raised for a string that has no UTF-8
            raise InvalidRequest("the text holds half a surrogate pair, which is no character") from None
        return encoding


def _restored(
    backend: str, special_tokens: Mapping[str, str], eos_ids: Iterable[int], has_token_types: bool
) -> Tokenizer:
    made = tokenizers.Tokenizer.from_str(backend)
    return Tokenizer(made, special_tokens, eos_ids, has_token_types=has_token_types)


def _span(sequence_ids: Sequence[int | None], wanted: int) -> tuple[int, int] | None:
    """Return where the wanted text begins and ends in a pair's tokens; None if it has none."""
    if wanted not in sequence_ids:
        return None
    begin = sequence_ids.index(wanted)
    return begin, begin + sequence_ids.count(wanted)


def _without_marks(offsets: list[tuple[int, int]], text: str, mark: str) -> list[tuple[int, int]]:
    """Convert character offsets in a marked text to offsets in the text without its marks."""
    at = [match.start() for match in re.finditer(mark, text)]
    size = len(mark)
    return [
        (start - size * bisect_left(at, start), stop - size * bisect_left(at, stop))
        for start, stop in offsets
    ]


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
