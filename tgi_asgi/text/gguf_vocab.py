"""Rebuild a tokenizer from a GGUF file's metadata, as the model's own tokenizer.json would build it.

Five kinds of vocabulary are supported. "gpt2" is byte-level BPE: the file contains its merges, but only
names how text is split before them (`tokenizer.ggml.pre`; `gguf_splits` knows what each name means). "llama"
is sentencepiece BPE: its merges follow from the scores. "gemma4" is sentencepiece BPE with the merges in the
file. "bert" and "t5" are WordPiece and unigram, of embedding models (`gguf_encoder_vocab`). Other kinds are
refused, because a wrong split silently yields wrong tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.text import gguf_encoder_vocab, sentencepiece_vocab
from tgi_asgi.text.gguf_splits import SENTENCEPIECE, SPLITS, Split
from tgi_asgi.text.sentencepiece_vocab import CONTROL, MAX_TOKENS, NORMAL, USER_DEFINED, add_tokens

_KEY = "tokenizer.ggml."
_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # the key's own spelling
    "cls_token": "cls_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
# A GGUF file names one end token where generation_config.json lists several. These control tokens always end
# a turn, a text or a file, as in llama.cpp; files made from an added_tokens.json call them defined by a user.
_END_KEYS = tuple(f"{name}_token_id" for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"))
# Unless the file names others, as in llama.cpp.
_USUAL_IDS = {
    "llama": {"bos_token": 1, "eos_token": 2},
    "t5": {"eos_token": 1, "unk_token": 2},
    "bert": {"bos_token": 101, "unk_token": 100, "sep_token": 102},
}
_END_TEXTS = frozenset(
    {
        "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<|endoftext|>",
        "<end_of_turn>", "<|end_of_turn|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<turn|>",
        "<|tool_response>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "[e~[",  # noqa: RUF001 - DeepSeek's
        "<|fim_pad|>", "<|fim_repo|>", "<|repo_name|>", "<|file_sep|>",
    }
)  # fmt: skip
# These do if they are control tokens, but not if a user defined them: Gemma has tags of HTML, such as </s>.
_OTHER_END_TEXTS = frozenset(
    {
        "</s>", "<eos>", "[EOS]", "[EOT]", "<EOT>", "_<EOT>", "\u2581<EOT>", "[PAD]", "<PAD>", "<fim_pad>",
        "<fim-pad>", "<fim-repo>", "<REPO>", "<reponame>",
    }
)  # fmt: skip
# Phi 3's other special tokens take the white space after them, which files do not say.
_KEEPING_OF_PHI3 = ("<unk>", "<s>", "<|endoftext|>")
# Models whose answers may have several messages: if their vocabulary has both, <|end|> ends one message.
_MESSAGE_ENDS = (("<|return|>", "<|call|>"), ("<|flush|>", "<|calls|>"))  # harmony; Solar Open


@dataclass(frozen=True, slots=True)
class GgufVocab:
    """The tokenizer that the metadata describes."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]  # "bos_token" -> text
    eos_ids: frozenset[int]
    adds_bos: bool  # whether the BOS token goes before every text
    adds_eos: bool
    separator: str | None = None  # what goes before a pair's second text
    is_of_encoder: bool = False  # the tokens around pairs are an encoder's: the first is not repeated


def build(metadata: Mapping[str, Any]) -> GgufVocab:
    """Build the tokenizer that `metadata` (of a GGUF file) describes.

    Raises:
        ModelLoadError: if the vocabulary is absent, contradicts itself, or is of an unsupported kind.
    """
    kind = metadata.get(_KEY + "model")
    if kind not in ("gpt2", "llama", "gemma4", "bert", "t5"):
        raise ModelLoadError(
            f"the GGUF file's tokenizer is of the kind {kind!r:.100}; `gpt2` (byte-level BPE), "
            "`llama` (sentencepiece), `gemma4` (sentencepiece with merges), `bert` (WordPiece) and `t5` "
            "(unigram) are supported"
        )
    try:
        tokens = _read_tokens(metadata)
        end_texts = _end_texts(tokens)
        given_types = _read_array(metadata, "token_type", len(tokens))
        types = _with_ends(tokens, given_types or [NORMAL] * len(tokens), end_texts)
        if kind == "bert":
            tokens = gguf_encoder_vocab.restore_word_pieces(tokens, types)
        special_ids = _read_special_ids(metadata, len(tokens), kind)
        backend = _backend(metadata, kind, tokens, types, special_ids.get("unk_token"))
        # Not the others, if the types say that they are text: padding may be any token, such as "!".
        named = special_ids if given_types is None else special_ids.keys() & {"bos_token", "eos_token"}
        is_phi3 = kind == "llama" and metadata.get("general.architecture") == "phi3"
        ids = {special_ids[name] for name in named}
        add_tokens(backend, tokens, types, ids, keeping=_KEEPING_OF_PHI3 if is_phi3 else None)
    except ModelLoadError:
        raise
    except Exception as error:  # `tokenizers` raises a bare Exception
        raise ModelLoadError(f"the GGUF file's vocabulary is damaged: {error}") from error
    return GgufVocab(
        backend,
        {name: tokens[token_id] for name, token_id in special_ids.items()},
        _eos_ids(metadata, tokens, types, end_texts),
        adds_bos=_adds_bos(metadata, kind),
        adds_eos=kind == "bert" or _flag(metadata, "add_eos_token", kind == "t5"),
        separator=_separator(metadata, special_ids, tokens) if kind != "bert" else None,
        is_of_encoder=kind in ("bert", "t5") or f"{_KEY}add_sep_token" in metadata,
    )


def _backend(
    metadata: Mapping[str, Any], kind: str, tokens: list[str], types: Sequence[int], unknown: int | None
) -> tokenizers.Tokenizer:
    """Build the tokenizer without its special tokens; `unknown` is the token for unknown words, if any."""
    if kind == "llama":
        return _scored(metadata, tokens, types)
    if kind == "t5":
        return gguf_encoder_vocab.unigram(metadata, tokens, _read_scores(metadata, len(tokens)), unknown)
    if kind == "bert":
        return gguf_encoder_vocab.word_pieces(metadata, tokens, None if unknown is None else tokens[unknown])
    return _merged(metadata, tokens, SENTENCEPIECE if kind == "gemma4" else _split_of(metadata))


def _adds_bos(metadata: Mapping[str, Any], kind: str) -> bool:
    """Return whether the BOS token goes before every text."""
    if kind in ("bert", "gemma4"):
        # Whatever the file says, as in llama.cpp. The first Gemma 4 files say no, but the model outputs
        # nonsense without BOS (llama.cpp#21500).
        return True
    by_default = kind == "llama" or (kind == "gpt2" and _split_of(metadata).adds_bos)
    return _flag(metadata, "add_bos_token", by_default)


def _eos_ids(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], end_texts: frozenset[str]
) -> frozenset[int]:
    """Return the tokens that end an answer: those that the file names, and control tokens with such texts."""
    named = (_token_id(metadata, key, len(tokens)) for key in _END_KEYS)
    texts = end_texts | _OTHER_END_TEXTS
    controls = (index for index, kind in enumerate(types) if kind == CONTROL and tokens[index] in texts)
    return frozenset((*(index for index in named if index is not None), *controls))


def _separator(
    metadata: Mapping[str, Any], special_ids: Mapping[str, int], tokens: Sequence[str]
) -> str | None:
    """Return what goes before a pair's second text, after the end of the first."""
    separates = _flag(metadata, "add_sep_token", False) and "sep_token" in special_ids
    return tokens[special_ids["sep_token"]] if separates else None


def _end_texts(tokens: Sequence[str]) -> frozenset[str]:
    """Return the texts of tokens that always end an answer in this vocabulary."""
    known = _END_TEXTS.intersection(tokens)
    has_messages = any(known.issuperset(pair) for pair in _MESSAGE_ENDS)
    return known - {"<|end|>"} if has_messages else known


def _with_ends(tokens: Sequence[str], types: Sequence[int], end_texts: frozenset[str]) -> list[int]:
    """Return the types of tokens, where those that end a turn are control tokens, as llama.cpp has them."""
    return [
        CONTROL if kind == USER_DEFINED and token in end_texts else kind
        for token, kind in zip(tokens, types, strict=True)
    ]


def _read_special_ids(metadata: Mapping[str, Any], size: int, kind: str) -> dict[str, int]:
    usual = _USUAL_IDS.get(kind, {}).items()
    given = ((name, _token_id(metadata, key, size)) for name, key in _SPECIAL_IDS.items())
    found = {
        **{name: token_id for name, token_id in usual if token_id < size},
        **{name: token_id for name, token_id in given if token_id is not None},
    }
    if kind == "bert":  # whatever the file says, as in llama.cpp
        if "sep_token" not in found:
            raise ModelLoadError("the GGUF file names no token that ends a text")
        found["eos_token"] = found["sep_token"]
    return found


def _read_scores(metadata: Mapping[str, Any], size: int) -> list[Any]:
    scores = _read_array(metadata, "scores", size)
    if scores is None:
        raise ModelLoadError("the GGUF file has no `tokenizer.ggml.scores`")
    return scores


def _split_of(metadata: Mapping[str, Any]) -> Split:
    name = metadata.get(_KEY + "pre")
    split = SPLITS.get(name) if isinstance(name, str) else None
    if split is None:
        raise ModelLoadError(
            f"the GGUF file's pre-tokenizer is {name!r}, which is not supported; "
            f"known are {', '.join(SPLITS)}"
        )
    return split


def _merged(metadata: Mapping[str, Any], tokens: list[str], split: Split) -> tokenizers.Tokenizer:
    """Build the tokenizer of a vocabulary whose merges are in the file."""
    merges = metadata.get(_KEY + "merges")
    if not isinstance(merges, Sequence) or isinstance(merges, str):
        raise ModelLoadError("the GGUF file has no `tokenizer.ggml.merges`")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    if not split.is_byte_level:
        # llama.cpp ignores `add_space_prefix` here; these models' tokenizers add no space.
        return _sentencepiece(metadata, tokens, pairs, has_prefix=False)
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=split.ignores_merges))
    backend.pre_tokenizer = split.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    if split.normalizes:
        backend.normalizer = normalizers.NFC()
    return backend


def _scored(metadata: Mapping[str, Any], tokens: list[str], types: Sequence[int]) -> tokenizers.Tokenizer:
    """Build the tokenizer of a vocabulary whose scores determine the order of merges."""
    scores = _read_scores(metadata, len(tokens))
    merges = sentencepiece_vocab.merges_by_score(tokens, types, scores)
    return _sentencepiece(metadata, tokens, merges, has_prefix=_flag(metadata, "add_space_prefix", True))


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], merges: list[Any], *, has_prefix: bool
) -> tokenizers.Tokenizer:
    """Build a tokenizer that merges a text as a whole; `has_prefix` puts a space before it."""
    backend = sentencepiece_vocab.bpe(tokens, merges, _token_id(metadata, "unknown_token_id", len(tokens)))
    sentencepiece_vocab.set_spaces(backend, has_prefix=has_prefix)
    return backend


def _read_tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get(_KEY + "tokens")
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not 0 < len(tokens) <= MAX_TOKENS:
        raise ModelLoadError("the GGUF file has no usable `tokenizer.ggml.tokens`")
    texts = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    if len(set(texts)) != len(texts):
        raise ModelLoadError("the GGUF file's vocabulary has the same token twice")
    return texts


def _read_array(metadata: Mapping[str, Any], name: str, size: int) -> list[Any] | None:
    values = metadata.get(_KEY + name)
    if values is None:
        return None
    if not hasattr(values, "tolist") or len(values) != size:
        raise ModelLoadError(f"`{_KEY}{name}` must be an array of {size} numbers, one a token")
    result: list[Any] = values.tolist()
    return result


def _token_id(metadata: Mapping[str, Any], key: str, size: int) -> int | None:
    """Return a special token's id; an id outside the vocabulary means that there is none."""
    value = metadata.get(_KEY + key)
    return value if type(value) is int and 0 <= value < size else None


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(_KEY + key)
    return value if isinstance(value, bool) else default
