"""Reads how a model's authors want it sampled, from generation_config.json or a GGUF file's keys."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tgi_asgi.formats.files import read_json, read_optional_json
from tgi_asgi.settings.sampling import SamplingDefaults, broken_rules

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
MAX_SUPPRESSED = 512  # tokens; each costs time in every step. Models have two or three
# llama.cpp's keys, by the names of generation_config.json.
_GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
    "suppress_tokens": "tokenizer.ggml.suppress_tokens",
}
_OLDER = ("suppress_tokens", "bad_words_ids")  # also in the config.json of models older than the file
# What else changes the text that `generate` writes, with the values that do not.
_UNREAD: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("begin_suppress_tokens", "exponential_decay_length_penalty", "sequence_bias", "stop_strings",
         "top_h", "watermarking_config"),
        (),
    ),
    **dict.fromkeys(
        ("encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "min_length", "min_new_tokens",
         "no_repeat_ngram_size", "token_healing"),
        (0,),
    ),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams"), (1,)),
}  # fmt: skip


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Return the contents of generation_config.json; without it, the tokens that config.json suppresses.

    Raises:
        ModelLoadError: if a file is damaged.
    """
    path = directory / FILE
    if path.exists():
        return read_json(path)
    config = read_optional_json(directory / "config.json")
    return {name: config[name] for name in _OLDER if name in config}


def gguf_generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a GGUF file says, under the names of generation_config.json."""
    return {name: _plain(metadata[key]) for name, key in _GGUF_KEYS.items() if key in metadata}


def _plain(value: Any) -> Any:
    """Return a GGUF value as JSON would have it."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, float):  # float32 in the file: 0.95, not 0.949999988079071
        return float(f"{value:.7g}")
    return value


def sampling_defaults(config: Mapping[str, Any]) -> SamplingDefaults:
    """Return the recommended sampling values; log which values cannot be used.

    `do_sample` is ignored, as by vLLM and SGLang: a request decides whether it samples, by its temperature.
    """
    for name, rule in broken_rules(config).items():
        logger.warning("the model's %s is ignored: it must be %s, but is %.40r", name, rule, config[name])
    return SamplingDefaults.of(config)


def unread_settings(config: Mapping[str, Any]) -> list[str]:
    """Return the names of settings that change what `generate` writes, but nothing here."""
    found = [name for name, neutral in _UNREAD.items() if config.get(name) not in (None, *neutral)]
    words = config.get("bad_words_ids")
    has_longer = isinstance(words, list) and any(isinstance(each, list) and len(each) > 1 for each in words)
    return sorted([*found, "bad_words_ids of several tokens"] if has_longer else found)


def suppressed_ids(
    config: Mapping[str, Any], vocab_size: int, eos_ids: Collection[int] = ()
) -> tuple[int, ...]:
    """Return the ids of tokens that must never be sampled, such as Gemma 4's placeholders of images.

    They are those of `suppress_tokens`, and of `bad_words_ids` the words of one token (Marian's padding). As
    in `transformers`, a word that ends an answer is none.
    """
    given, words = config.get("suppress_tokens"), config.get("bad_words_ids")
    given = [*given] if isinstance(given, list) else []
    if isinstance(words, list):
        single = [each[0] for each in words if isinstance(each, list) and len(each) == 1]
        given += [each for each in single if each not in eos_ids]
    found = sorted({token for token in given if type(token) is int and 0 <= token < vocab_size})
    if len(found) > MAX_SUPPRESSED:
        logger.warning("suppress_tokens has %d tokens; only %d are suppressed", len(found), MAX_SUPPRESSED)
    return tuple(found[:MAX_SUPPRESSED])
