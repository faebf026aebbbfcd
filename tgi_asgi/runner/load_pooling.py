"""Determines how a model embeds, scores and classifies, from its files and the settings."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.model_info import Classification, Embedding, ModelInfo, Scoring
from tgi_asgi.models.config import ModelConfig, ServedConfig
from tgi_asgi.models.labels import LabelFiles
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.pooling import PoolingFiles
from tgi_asgi.settings import Settings
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.text.tokenizer import Tokenizer
from tgi_asgi.types import Pooling, PoolingKind

logger = logging.getLogger(__name__)

# How a pair is put to a model that is asked for a "yes", from Qwen3-Reranker's model card.
RANKING = """\
{%- set ns = namespace(instruct="Given a web search query, retrieve relevant passages that answer the query",
 query="", document="") -%}
{%- for message in messages -%}
{%- if message.role == "system" -%}{%- set ns.instruct = message.content -%}
{%- elif message.role == "query" -%}{%- set ns.query = message.content -%}
{%- elif message.role == "document" -%}{%- set ns.document = message.content -%}{%- endif -%}
{%- endfor -%}
<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that \
the answer can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ ns.instruct }}
<Query>: {{ ns.query }}
<Document>: {{ ns.document }}<|im_end|>
<|im_start|>assistant
<think>

</think>

{{ "" }}"""

_NOT_POOLED = "an encoder-decoder gives no vectors and no scores here"


def with_pooling(
    info: ModelInfo, opened: OpenModel, files: PoolingFiles, settings: Settings, tokens: tuple[int, ...],
    template: ChatTemplate | None,
) -> ModelInfo:  # fmt: skip
    """Return the API's description of a model with how it embeds, scores and classifies added.

    Args:
        tokens: The result of `score_tokens`.

    Raises:
        ModelLoadError: if a `Dense` layer does not fit.
    """
    config = opened.config
    if config.encoder_decoder is not None:
        return replace(info, why_no_pooling=_NOT_POOLED)
    kind = files.kind if settings.pooling is None else PoolingKind(settings.pooling)
    if kind is not None and files.reason:
        logger.warning("--pooling %s overrides all that the files ask for: %s", kind.value, files.reason)
    longest = min(settings.max_input_tokens or info.max_total_tokens, info.max_total_tokens)
    longest = min(longest, files.max_tokens or longest)
    given: dict[str, Any] = {}
    if kind is not None:
        dimensions = _dimensions(config, files)
        given["embedding"] = Embedding(Pooling(kind), dimensions, longest, files.is_normalized, files.prompts)
    labels = opened.companions.labels() if config.num_labels else LabelFiles()
    # Encoders are run by transformers' own code, which decides for itself.
    pad_id = labels.pad_id if isinstance(config, ModelConfig) else None
    if tokens:
        given["scoring"] = Scoring(
            Pooling(PoolingKind.LOGITS, tokens, pad_id), longest, _score_template(config, template)
        )
    reason = files.reason or "its files do not say how; start the server with --pooling last, mean or cls"
    if config.num_labels:
        given["classification"] = Classification(
            Pooling(PoolingKind.LOGITS, tuple(range(config.num_labels)), pad_id),
            longest,
            labels.names(config.num_labels),
            labels.activation_of(config.num_labels),
        )
    if config.num_labels > 2:
        reason = f"it has {config.num_labels} labels, and a score is of one or two"
    return replace(info, generates=_generates(config, files), why_no_pooling=reason, **given)


def uses_logits(config: ServedConfig, files: PoolingFiles, settings: Settings) -> bool:
    """Return whether requests use the model's logits: it generates, scores or classifies."""
    scores = config.num_labels > 0 or settings.score_tokens is not None or bool(files.score_tokens)
    return scores or _generates(config, files)


def _generates(config: ServedConfig, files: PoolingFiles) -> bool:
    return config.generates and not files.is_specified


def _dimensions(config: ServedConfig, files: PoolingFiles) -> int:
    """Return the dimension of a vector; raise `ModelLoadError` if the dense layers do not fit together."""
    dimensions = config.hidden_size
    for dense in files.dense:
        num_out, num_in = dense.weight.shape
        if num_in != dimensions:
            raise ModelLoadError(f"a Dense of modules.json expects {num_in} inputs, but gets {dimensions}")
        dimensions = num_out
    return dimensions


def score_tokens(
    config: ServedConfig, files: PoolingFiles, settings: Settings, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """Return the ids whose logits make a score: a classifier's labels, or tokens of files or settings.

    Raises:
        ModelLoadError: if the settings or files name tokens that the model lacks, or ask for what it cannot.
    """
    if config.encoder_decoder is not None:
        if settings.pooling is not None or settings.score_tokens is not None:
            raise ModelLoadError(f"--pooling and --score-tokens: {_NOT_POOLED}")
        return ()
    if config.num_labels:
        return tuple(range(config.num_labels)) if config.num_labels <= 2 else ()
    if settings.score_tokens is None:
        return _existing(config, "LogitScore", files.score_tokens)
    words = settings.score_tokens.split(",")
    found = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    if len(found) > 2 or any(len(ids) != 1 for ids in found):
        raise ModelLoadError(
            f"--score-tokens {settings.score_tokens}: expects one or two words, each a token of the model"
        )
    return _existing(config, f"--score-tokens {settings.score_tokens}", tuple(token for [token] in found))


def _existing(config: ServedConfig, name: str, tokens: tuple[int, ...]) -> tuple[int, ...]:
    if any(token >= config.vocab_size for token in tokens):
        raise ModelLoadError(f"{name} names tokens that the model lacks: {tokens}")
    return tokens


def _score_template(config: ServedConfig, template: ChatTemplate | None) -> str | None:
    if template is not None and template.mentions("query") and template.mentions("document"):
        return template.source
    return None if config.num_labels else RANKING
