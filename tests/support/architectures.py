"""Tiny random checkpoints of any architecture of `AutoModelForCausalLM`, and their reference outputs.

`architecture_table` holds the particulars of each architecture. As in `family_maker`, the weights are chosen
so that a wrong model produces visibly different logits. `architecture_report` makes every checkpoint and
prints its properties.
"""

from __future__ import annotations

import copy
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from tests.support.architecture_table import CONFIG, NO_REFERENCE, NOT_BUILT, TYPES

VOCAB_SIZE = 320
_SPECIAL_TOKENS = ("<s>", "</s>", "<|endoftext|>")  # beginning, end, padding
_MIN_GAP = 0.02  # smallest gap between the two largest logits for a clear greedy choice
_SPREAD = 3.0  # approximate standard deviation of the logits

_LAYERS = 3
_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCAB_SIZE),
    **dict.fromkeys(("hidden_size", "d_model", "embedding_size", "lru_width", "word_embed_proj_dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dff", "n_inner"), 96
    ),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "ffn_hidden_size", "dim_ff"), 96),
    **dict.fromkeys(("shared_intermediate_size", "feed_forward_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(
        ("num_heads", "swa_num_attention_heads", "linear_num_heads", "linear_num_value_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "linear_head_dim", "linear_key_head_dim"), 16),
    **dict.fromkeys(("linear_value_head_dim", "index_head_dim", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "max_target_positions", "max_seq_len", "n_ctx"), 512),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), 12),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_state", "mamba_d_head", "mamba_chunk_size"), 16),
    **dict.fromkeys(("chunk_size", "block_size", "state_size", "ssm_state_size", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "index_topk"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("mamba_n_groups", "first_k_dense_replace", "num_dense_layers", "topk_group"), 1),
    **dict.fromkeys(("index_n_heads",), 16),
}
# By any model's name; since transformers 5.24 an output has its cache under the old name, too.
_CACHES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
_LAST_NORM = re.compile(
    r"^(?!.*(per_layer|\.(layers?|h|blocks)\.\d)).*(norm|ln|ln_f|norm_f)\.weight$", re.IGNORECASE
)
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")  # lists with one word for each layer


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one torch thread: threads that wait for each other make tiny models ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def buildable() -> list[str]:
    """Return the types that `make` supports and the installed transformers has."""
    return [name for name in TYPES if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in NOT_BUILT]


def servable() -> list[str]:
    """Return the buildable types whose `reference` is the same however a sequence is cut into chunks."""
    return [name for name in buildable() if name not in NO_REFERENCE]


def config(model_type: str, **more: Any) -> transformers.PretrainedConfig:
    """Return the configuration of a tiny model of this type that contains each kind of layer."""
    kind = CONFIG_MAPPING[model_type]
    particular = copy.deepcopy(dict(CONFIG.get(model_type, {}))) | more
    default = kind(**particular.pop("default", {}))
    known = vars(default)
    other_names = dict(default.attribute_map)
    values: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1}
    values["pad_token_id"] = None if known.get("pad_token_id") is None else 2
    for name, size in _SIZES.items():
        name = other_names.get(name, name)
        if known.get(name) or name == "num_key_value_heads":  # skip values that are None or switched off
            values[name] = size
    if "qk_rope_head_dim" in known:  # each head has its own keys and values, from one latent vector
        values["num_key_value_heads"] = 4
        values.pop("head_dim", None)
    for name in ("n_group", "num_expert_group"):
        if (known.get(name) or 1) > 1:
            values[name] = 2
    if "is_decoder" in known:
        values["is_decoder"] = True
    for name in _KINDS:
        if known.get(name):
            kinds = list(dict.fromkeys(known[name]))
            num_layers = particular.get("num_hidden_layers", _LAYERS)
            values[name] = [kinds[index % len(kinds)] for index in range(num_layers)]
    made: transformers.PretrainedConfig = kind(**{**values, **particular})
    return made


@one_thread()
def make(model_type: str, folder: Path) -> None:
    """Write a checkpoint with a tokenizer; the same type always yields the same checkpoint.

    Raises:
        ValueError: if `NOT_BUILT` lists the type, with the reason given there.
    """
    if model_type in NOT_BUILT:
        raise ValueError(f"{model_type}: {NOT_BUILT[model_type]}")
    seed = zlib.crc32(model_type.encode())
    torch.manual_seed(seed)
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    made = config(model_type)
    made._attn_implementation = "eager"
    model: transformers.PreTrainedModel = kind(made).eval()
    with torch.no_grad():
        randomise(model)
        _spread(model, random_ids(40, seed))
    model.save_pretrained(folder)
    save_tokenizer(folder)


def random_ids(length: int, seed: int) -> list[int]:
    """Return random ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(len(_SPECIAL_TOKENS), VOCAB_SIZE, (length,), generator=generator).tolist()
    return ids


def made_once(root: Path, make: Callable[[str, Path], None]) -> Callable[[str], Path]:
    """Return a function that returns the directory of a type's checkpoint; tests only read it."""

    def of_type(model_type: str) -> Path:
        folder = root / model_type
        if not (folder / "config.json").exists():
            make(model_type, folder)
        return folder

    return of_type


def open_reference(
    folder: Path, kind: Any = transformers.AutoModelForCausalLM
) -> transformers.PreTrainedModel:
    """Return transformers' own model in float32 with eager attention; no weight may be missing."""
    opened: Any = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model: transformers.PreTrainedModel = opened[0].eval()
    assert not any(opened[1].values()), f"{folder} is not all of the model: {opened[1]}"
    return model


@one_thread()
def reference(folder: Path, ids: list[int]) -> np.ndarray:
    """Return the logits [n_tokens, vocab] float32 after each token, all computed in one call."""
    return _logits(open_reference(folder), ids)


@one_thread()
def references(folder: Path, sequences: Iterable[list[int]]) -> list[np.ndarray]:
    """Return `reference` of each of several sequences; the model is opened once."""
    model = open_reference(folder)
    return [_logits(model, ids) for ids in sequences]


@one_thread()
def greedy(folder: Path, ids: list[int], num_tokens: int) -> tuple[list[int], float]:
    """Return the greedy continuation and the smallest gap on the way between the two largest logits."""
    return _greedy(open_reference(folder), ids, num_tokens)


@one_thread()
def clear_prompts(folder: Path, lengths: Iterable[int], num_tokens: int) -> list[tuple[list[int], list[int]]]:
    """Return prompts and their greedy continuations, with clear gaps and without special tokens."""
    model = open_reference(folder)
    return [_clear_prompt(model, length, num_tokens) for length in lengths]


def _clear_prompt(
    model: transformers.PreTrainedModel, length: int, num_tokens: int
) -> tuple[list[int], list[int]]:
    last = getattr(model.config, "unpadded_vocab_size", VOCAB_SIZE) - 1  # Inkling pads its vocabulary
    for seed in range(100):
        ids = [min(each, last) for each in random_ids(length, seed)]
        found, gap = _greedy(model, ids, num_tokens)
        if gap > _MIN_GAP and min(found) >= len(_SPECIAL_TOKENS):
            return ids, found
    raise AssertionError(f"{type(model).__name__}: no prompt whose answer is clear")


@one_thread()
def piecewise(folder: Path, ids: list[int], lengths: Iterable[int]) -> np.ndarray:
    """Return the logits as `reference` does, computed in pieces of these lengths with the model's cache."""
    model = open_reference(folder)
    past: dict[str, Any] = {}
    rows, at = [], 0
    with torch.inference_mode():
        for length in lengths:
            found = model(torch.tensor([ids[at : at + length]]), use_cache=True, **past)
            past = {name: found[name] for name in _CACHES if found.get(name) is not None}
            if "cache" in past:
                past = {"cache": past["cache"]}
            assert past, "no cache comes back"
            rows.append(found.logits[0].float().numpy())
            at += length
    assert at == len(ids)
    return np.concatenate(rows)


def _greedy(model: transformers.PreTrainedModel, ids: list[int], num_tokens: int) -> tuple[list[int], float]:
    found, gap = list(ids), np.inf
    for _ in range(num_tokens):
        last = _logits(model, found)[-1]
        second, best = np.sort(last)[-2:]
        gap = min(gap, float(best - second))
        found.append(int(last.argmax()))
    return found[len(ids) :], gap


def _logits(model: transformers.PreTrainedModel, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
    return found


def randomise(model: transformers.PreTrainedModel) -> None:
    """Set every parameter, and every bias that is a buffer, to a value that affects the logits.

    With tied embeddings, a token's own logit is always the largest if its embedding outweighs what the layers
    add. Such models therefore get small embeddings and large matrices.
    """
    embedding_size, gain = (0.1, 1.5) if _is_tied(model) else (0.5, 1.0)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    for name, value in model.state_dict(keep_vars=True).items():
        if name.endswith("tid2eid"):  # maps each token to its experts
            value.copy_(torch.rand(len(value), model.config.n_routed_experts).argsort()[:, : value.shape[1]])
        if not isinstance(value, nn.Parameter) and not name.endswith(("bias", "biases", "layer_scalar")):
            continue
        if id(value) in embeddings:
            value.normal_(0, embedding_size)
        elif name.endswith("dt_bias"):
            value.normal_(-1.0, 0.5)  # time steps at which the state changes
        elif value.dim() < 2 or (_is_constant(value) and min(value.shape) == 1):
            value += torch.randn(value.shape) * 0.2  # around the ones or zeros of a norm or a bias
        elif "A_log" not in name:
            value.normal_(0, gain * _fan_in(name, value, id(value) in transposed) ** -0.5)


def _fan_in(name: str, value: Tensor, is_transposed: bool) -> int:
    if "conv" in name:
        return value[0].numel()
    return value.shape[0 if is_transposed else -1]


def _is_constant(value: Tensor) -> bool:
    return bool((value == value.flatten()[0]).all())


def _is_tied(model: transformers.PreTrainedModel) -> bool:
    """Return whether the head is the embedding and no norm rescales the embedding before the layers."""
    head, names = model.get_output_embeddings(), (name for name, _ in model.named_parameters())
    if any(
        re.search(r"embeddings\.LayerNorm|embeddings_layer_norm|layernorm_embedding|layer_norm_emb", name)
        for name in names
    ):
        return False
    return head is not None and head.weight is model.get_input_embeddings().weight


def _spread(model: transformers.PreTrainedModel, ids: list[int]) -> None:
    """Scale the head, or the norm before a tied head, until the logits' spread is about `_SPREAD`."""
    head: Any = model.get_output_embeddings()
    if head is None:
        return
    weight = head.weight
    if _is_tied(model):
        norms = [value for name, value in model.named_parameters() if _LAST_NORM.search(name)]
        weight = norms[-1] if norms else weight
    for _ in range(12):
        std = model(torch.tensor([ids]), use_cache=False).logits.std()
        if 0.8 < std / _SPREAD < 1.25:
            return
        weight *= (_SPREAD / std).clamp(0.1, 10.0)


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer with a text for each id: special tokens, the 256 bytes, pairs of letters."""
    letters = "etaoins"
    pairs = [(first, second) for first in letters + "rh" for second in letters]
    texts = [*_SPECIAL_TOKENS, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    pairs = pairs[: VOCAB_SIZE - len(texts)]
    vocabulary = {text: index for index, text in enumerate([*texts, *map("".join, pairs)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL_TOKENS))
    backend.save(str(folder / "tokenizer.json"))
    options = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
