"""Tokenizers of checkpoints without tokenizer.json, or with an older one: those from before 2023 and others.

sentencepiece's tokenizer.model is read here if the checkpoint's tokenizer class does nothing else to a text,
and tiktoken's files if the class is known. The other kinds (vocab.json with merges.txt, vocab.txt,
tekken.json ...) are left to `transformers`, which knows what each class does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import read_optional_json
from tgi_asgi.text.sentencepiece_file import SentencepieceModel, read_model
from tgi_asgi.text.sentencepiece_vocab import CONTROL, NORMAL, UNUSED, USER_DEFINED
from tgi_asgi.text.tiktoken_file import CLASSES, is_tiktoken, read_tiktoken

_SENTENCEPIECE = "tokenizer.model"
_SENTENCEPIECES = (_SENTENCEPIECE, "spiece.model", "sentencepiece.bpe.model")
_CHATGLM = "ChatGLMTokenizer"
# ChatGLM 2's and 3's tokens, whose ids follow sentencepiece's; those of roles are 3's, whose files list them.
_CHATGLM_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_CHATGLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_CHATGLM_PREFIX = ("[gMASK]", "sop")
_ID = re.compile("[0-9]{1,9}")
_NAMED = (NORMAL, CONTROL, USER_DEFINED, UNUSED)  # kinds of tokens that may have another name; bytes may not
# Classes that only add an optional BOS before a text and an EOS after it, and use ids unchanged.
_PLAIN_CLASSES = frozenset({
    "", "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "InternLMTokenizer", "InternLM2Tokenizer",
    "BaichuanTokenizer", "YiTokenizer", "OrionTokenizer", "PreTrainedTokenizer", "TokenizersBackend",
})  # fmt: skip
# Classes that set what surrounds a text, whatever tokenizer.json says, in transformers 4 and so in TGI; with
# whether they add BOS by default.
_SURROUNDING = {
    "LlamaTokenizer": True, "CodeLlamaTokenizer": True, "GemmaTokenizer": True, "CohereTokenizer": True,
    "GPTNeoXTokenizer": False,
}  # fmt: skip
# Sets of files; one must be complete before `transformers` is asked for a tokenizer. Without any of them it
# returns an empty one for some classes.
_KNOWN = (
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("tekken.json",),
    ("tiktoken.model",),
    ("qwen.tiktoken",),
    *((name,) for name in _SENTENCEPIECES),
)
VOCABULARIES = ("tokenizer.json", *(names[0] for names in _KNOWN))
_ADVICE = "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes one"


def make_backend(directory: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Build the tokenizer of a directory without tokenizer.json.

    Also returns what the files add to the configuration.

    Args:
        config: Contents of tokenizer_config.json.

    Raises:
        ModelLoadError: if there are no files to build it from, or they are damaged.
    """
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    path, ranks = directory / _SENTENCEPIECE, CLASSES.get(kind)
    added: dict[str, Any]
    if ranks is not None and (directory / ranks.file).is_file():
        backend, added = read_tiktoken(directory / ranks.file, ranks), dict(ranks.named)
        _add_listed(backend, config)
        _put_before(backend, ranks.prefix)
    elif path.is_file() and kind == _CHATGLM:
        backend, added = _of_chatglm(path, config)
    elif path.is_file() and kind in _PLAIN_CLASSES and not is_tiktoken(path):
        backend, added = _of_sentencepiece(path, config)
    elif any(all((directory / name).is_file() for name in names) for names in _KNOWN):
        backend, added = _of_transformers(directory)
    else:
        raise ModelLoadError(
            f"no such file: {directory / 'tokenizer.json'}, nor another that has a vocabulary; {_ADVICE}"
        )
    if "added_tokens_decoder" not in config:
        added["added_tokens_decoder"] = _added_tokens(directory)
    return backend, added


def missing_tokens(backend: tokenizers.Tokenizer, directory: Path) -> dict[str, Any]:
    """Return the tokens of added_tokens.json that the tokenizer.json lacks, as `added_tokens_decoder`.

    Older fine-tunes added tokens to a slow tokenizer and kept the tokenizer.json of the base model.
    """
    listed = _added_tokens(directory)
    return {
        token_id: token for token_id, token in listed.items() if backend.token_to_id(token["content"]) is None
    }


def surround_by_flags(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Follow `add_bos_token` and `add_eos_token`, if given, where tokenizer.json does something else.

    Authors of these classes' files tried them with transformers 4, which did so; transformers 5 ignores the
    two keys beside a tokenizer.json, and no longer writes them. Prompts of chats are not affected: their
    templates write the BOS token.
    """
    adds_bos = _SURROUNDING.get(str(config.get("tokenizer_class")).removesuffix("Fast"))
    if adds_bos is None or all(config.get(f"add_{name}_token") is None for name in ("bos", "eos")):
        return
    wanted = _wanted(config, adds_bos=adds_bos)
    parts = _parts(backend, config, wanted)
    bos, eos = ([backend.token_to_id(parts[name])] if name in parts else [] for name in ("bos", "eos"))
    plain, whole = (backend.encode("", add_special_tokens=adds).ids for adds in (False, True))
    if len(parts) == len(wanted) and whole != [*bos, *plain, *eos]:
        surround(backend, parts)


def check_ids(backend: tokenizers.Tokenizer, listed: Mapping[str, Any]) -> None:
    """Refuse a vocabulary in which an added token's id differs from the one in the configuration.

    Raises:
        ModelLoadError: if one differs; the message names the token.
    """
    for token_id, entry in listed.items():
        content = entry["content"]
        found = backend.token_to_id(content)
        if found != int(token_id):
            raise ModelLoadError(f"the token {content!r} should have the id {token_id}, and has {found}")


def _of_sentencepiece(path: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    model = read_model(path)
    _rename_listed(model, config)
    if config.get("add_prefix_space") is False:
        model.has_prefix = False
    if config.get("legacy") is False:
        model.prefixes_parts = False
    try:
        backend = model.backend()
    except ModelLoadError as error:
        raise ModelLoadError(f"{path}: {error}") from None
    except Exception as error:  # `tokenizers` raises a bare Exception
        raise ModelLoadError(f"{path} is damaged: {error}") from error
    ids = {"bos_token": model.bos, "eos_token": model.eos, "unk_token": model.unknown}
    named = {
        name: text
        for name, token_id in ids.items()
        if not config.get(name) and (text := model.token(token_id)) is not None
    }
    surround(backend, _parts(backend, {**config, **named}, _wanted(config)))
    return backend, dict(named)


def _listed(config: Mapping[str, Any]) -> dict[int, str]:
    """Return the tokens of `added_tokens_decoder`; damaged entries are refused later."""
    listed = config.get("added_tokens_decoder")
    return {
        int(token_id): entry["content"]
        for token_id, entry in (listed.items() if isinstance(listed, dict) else ())
        if _ID.fullmatch(str(token_id)) and isinstance(entry, dict) and _is_text(entry.get("content"))
    }


def _is_text(content: object) -> bool:
    """Return whether a token's content is text; JSON may hold half of a character, which has no bytes."""
    return isinstance(content, str) and not any("\ud800" <= each <= "\udfff" for each in content)


def _rename_listed(model: SentencepieceModel, config: Mapping[str, Any]) -> None:
    """Give tokens the texts that `added_tokens_decoder` lists for their ids.

    InternLM 2's vocabulary has spare tokens ([UNUSED_TOKEN_146]), which its chats use under other names.
    """
    own = set(model.tokens)
    for token_id, text in _listed(config).items():
        may_be_named = token_id < len(model.tokens) and model.types[token_id] in _NAMED
        if may_be_named and text and text not in own:
            model.tokens[token_id], model.types[token_id] = text, USER_DEFINED


def _of_chatglm(path: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Read ChatGLM 2's and 3's tokenizer, whose code adds tokens to sentencepiece's, two before each text."""
    backend, added = _of_sentencepiece(path, config)
    has_roles = not set(_CHATGLM_ROLES).isdisjoint(_listed(config).values())
    tokens = (*_CHATGLM_TOKENS, *(_CHATGLM_ROLES if has_roles else ()))
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in tokens])
    _put_before(backend, _CHATGLM_PREFIX)
    return backend, added


def _add_listed(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens of `added_tokens_decoder` as special ones, by their ids; `check_ids` compares these."""
    texts = [text for _, text in sorted(_listed(config).items())]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in texts])


def _put_before(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Put these tokens before each text, except for those that the vocabulary lacks."""
    known = [(text, token_id) for text in tokens if (token_id := backend.token_to_id(text)) is not None]
    if known:
        before = [f"{text}:0" for text, _ in known]
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A:0"], pair=[*before, "$A:0", "$B:1"], special_tokens=known
        )


def _wanted(config: Mapping[str, Any], *, adds_bos: bool = True) -> list[str]:
    """Return which tokens go around a text: "bos" unless it is disabled, "eos" if it is enabled.

    Args:
        adds_bos: Whether BOS does if the configuration does not say.
    """
    flags = {name: config.get(f"add_{name}_token") for name in ("bos", "eos")}
    defaults = {"bos": adds_bos, "eos": False}
    return [name for name, flag in flags.items() if (defaults[name] if flag is None else flag)]


def _parts(backend: tokenizers.Tokenizer, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return the texts of those of the named tokens that the vocabulary has."""
    parts: dict[str, str] = {}
    for name in names:
        given = config.get(f"{name}_token")
        text = given.get("content") if isinstance(given, dict) else given
        if isinstance(text, str) and backend.token_to_id(text) is not None:
            parts[name] = text
    return parts


def surround(backend: tokenizers.Tokenizer, parts: Mapping[str, str]) -> None:
    """Put these tokens around texts, and nothing else."""
    backend.post_processor = processors.TemplateProcessing(
        single=[*_piece(parts, "bos", 0), "$A:0", *_piece(parts, "eos", 0)],
        pair=[
            *_piece(parts, "bos", 0), "$A:0", *_piece(parts, "eos", 0),
            *_piece(parts, "bos", 1), "$B:1", *_piece(parts, "eos", 1),
        ],
        special_tokens=[(text, backend.token_to_id(text)) for text in dict.fromkeys(parts.values())],
    )  # fmt: skip


def _piece(parts: Mapping[str, str], name: str, segment: int) -> list[str]:
    return [f"{parts[name]}:{segment}"] if name in parts else []


def _of_transformers(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    import transformers
    from transformers.utils import import_utils as installed

    transformers.logging.set_verbosity_error()
    try:
        made = transformers.AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
        backend = made.backend_tokenizer
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ValueError(f"{type(made).__name__} is not of the tokenizers library")
        if not set(backend.get_vocab(with_added_tokens=False)) - set(made.all_special_tokens):
            raise ValueError(f"{type(made).__name__} finds no vocabulary")
    except Exception as error:  # a configuration can make a `transformers` class raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0][:300]
        has_library = installed.is_sentencepiece_available() and installed.is_protobuf_available()
        files = (path for name in _SENTENCEPIECES if (path := directory / name).is_file())
        if not has_library and not all(map(is_tiktoken, files)):
            reason = "for a file of sentencepiece it needs `pip install sentencepiece protobuf`"
        raise ModelLoadError(
            f"{directory} has no tokenizer.json, and transformers cannot make one of what there is "
            f"({reason}); {_ADVICE}"
        ) from error
    named = dict(made.special_tokens_map)
    if (directory / "tekken.json").is_file() and not named:  # the file names none, but its models know these
        named = {"bos_token": "<s>", "eos_token": "</s>"}
        surround(backend, _parts(backend, named, ["bos"]))
    return backend, named


def _added_tokens(directory: Path) -> dict[str, Any]:
    """Read added_tokens.json of older checkpoints, in the form of `added_tokens_decoder`."""
    path = directory / "added_tokens.json"
    found = read_optional_json(path)
    if not all(type(token_id) is int for token_id in found.values()):
        raise ModelLoadError(f"{path} must give each token a number")
    return {str(token_id): {"content": content, "special": False} for content, token_id in found.items()}
