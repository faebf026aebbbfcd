"""What the API knows of the served model: its name, limits and arithmetic, and what it can do.

A loader makes one `ModelInfo` for each model; `/info`, the routes and the engine read it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from tgi_asgi.settings.sampling import NO_DEFAULTS, SamplingDefaults
from tgi_asgi.types import Pooling


@dataclass(frozen=True, slots=True)
class Embedding:
    """How a model turns texts into vectors.

    Attributes:
        dimensions: Dimensions of a vector.
        max_tokens: Maximum number of tokens of a text.
        is_normalized: Whether vectors have length 1, unless a request says otherwise.
        prompts: Named prompts that requests may have put before their texts.
    """

    pooling: Pooling
    dimensions: int
    max_tokens: int
    is_normalized: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a model scores a pair of texts: by one logit, or by the second of two logits minus the first.

    Attributes:
        template: Chat template with the roles `query`, `document` and `system` (the instruction), or None if
            the pair is tokenised as one.
    """

    pooling: Pooling
    max_tokens: int
    template: str | None = None


class Activation(enum.Enum):
    """How a classifier's logits become scores."""

    SOFTMAX = "softmax"  # probabilities of labels that exclude each other
    SIGMOID = "sigmoid"  # a probability for each label by itself
    IDENTITY = "identity"  # a regression's numbers


@dataclass(frozen=True, slots=True)
class Classification:
    """How a model classifies texts: by a logit for each label.

    Attributes:
        labels: Their names, in the order of the logits.
    """

    pooling: Pooling
    max_tokens: int
    labels: tuple[str, ...]
    activation: Activation


@dataclass(frozen=True, slots=True)
class EncoderDecoder:
    """What sets an encoder-decoder (T5, BART) apart: its answer does not continue the prompt's text."""

    starts: tuple[int, ...]  # tokens that the decoder begins with; neither prompt nor answer has them
    max_prompt: int | None = None  # tokens that the encoder reads; None: any number
    max_answer: int | None = None  # tokens that the decoder writes


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Description of the served model for the API."""

    model_id: str  # as the administrator named it: also the served name
    revision: str | None  # commit or file hash, if known
    architecture: str  # e.g. "LlamaForCausalLM"
    dtype: str  # arithmetic, e.g. "float32"
    device: str  # "cpu" or "cuda"
    vocab_size: int
    max_input_tokens: int
    max_total_tokens: int  # prompt and output
    eos_token_ids: frozenset[int]
    sampling: SamplingDefaults = NO_DEFAULTS  # for requests to other routes than TGI's own
    suppressed_ids: tuple[int, ...] = ()  # tokens that no request may sample
    kv_tokens: int = 0  # tokens that the KV cache holds, in sequences of `max_total_tokens`
    kv_bytes: int = 0
    max_batch_size: int = 0  # sequences per step
    num_kept_states: int = 0  # places for kept states of recurrent layers, from which later prompts resume
    kept_state_bytes: int = 0  # all of them together
    num_threads: int = 0
    num_shards: int = 1  # each with `num_threads` threads
    kernel_set: str | None = None  # instruction set of the CPU kernels
    prompt_precision: str | None = None  # arithmetic of prompts, if they have one of their own
    implementation: str = "native"  # or "transformers"
    is_batch_invariant: bool = True  # same bits whatever else is in the batch
    created: int = 0  # seconds since the epoch, constant for the process
    fingerprint: str = "fp_0"  # constant for (weights, dtype, code version, kernel options)
    encoder_decoder: EncoderDecoder | None = None  # None: it is none
    generates: bool = True  # whether it generates text; embedding and scoring models do not
    embedding: Embedding | None = None  # None: does not embed
    scoring: Scoring | None = None  # None: scores by its embeddings, if it has any
    classification: Classification | None = None  # None: not a classifier
    why_no_pooling: str = ""  # if it neither embeds nor scores: what the administrator can do about it
