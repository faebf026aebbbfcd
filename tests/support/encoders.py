"""Tiny embedding and reranking encoders: transformers checkpoints with a WordPiece tokenizer."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from tests.support.pooling_models import fix_weights

VOCAB_SIZE, CLS, SEP = 160, 2, 3
CONTEXT = 130  # positions; RoBERTa and its variants start at the third
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_LAYERS = {"dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4}
_OF_KIND: dict[str, dict[str, Any]] = {
    "XLMRoberta": {"type_vocab_size": 1},
    "DistilBert": _LAYERS,
    "ModernBert": {"pad_token_id": 0, "local_attention": 8, "global_attn_every_n_layers": 2},
    "EuroBert": {"pad_token_id": 0, "num_key_value_heads": 2, "head_dim": 16},
    "Gemma3Text": {
        "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 9, "use_bidirectional_attention": True,
    },
    "Albert": {"embedding_size": 32},
    "EmbeddingGemma2Text": {
        "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "sliding_window": 9,
        "hidden_size_per_layer_input": 16, "embedding_dim": 80, "pad_token_id": 0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "OlmoHybrid": {
        "num_key_value_heads": 2, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 4,
        "linear_num_value_heads": 4, "pad_token_id": 0,
    },
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "T5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
_OF_MODERN_BERT = {f"{name}_token_id": at for name, at in {"cls": 2, "sep": 3, "bos": 2, "eos": 3}.items()}
TEXTS = ("short", "a-much-longer-text-" * 5, "x")
# Models whose vectors or scores are in `oracle/sentence-transformers-encoders.json`.
RECORDED: dict[str, tuple[str, str, str | None]] = {
    "bert-mean": ("Bert", "Model", "mean_tokens"),
    "modernbert-cls": ("ModernBert", "Model", "cls_token"),
    "xlmroberta-cls": ("XLMRoberta", "Model", "cls_token"),
    "mpnet-mean": ("MPNet", "Model", "mean_tokens"),
    "distilbert-mean": ("DistilBert", "Model", "mean_tokens"),
    "bert-pairs": ("Bert", "ForSequenceClassification", None),
    "xlmroberta-pairs": ("XLMRoberta", "ForSequenceClassification", None),
    "modernbert-pairs": ("ModernBert", "ForSequenceClassification", None),
}


def make_encoder(kind: str, head: str = "Model", **changes: Any) -> transformers.PreTrainedModel:
    """Make a random model whose vectors reveal faults."""
    particular = {**_OF_KIND.get(kind, {}), **(_OF_MODERN_BERT if kind == "ModernBert" else {})}
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **particular, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model: transformers.PreTrainedModel = getattr(transformers, kind + head)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, 0.2 if is_norm else 0.15)
    return model


def save_encoder(
    directory: Path, kind: str, head: str = "Model", mode: str | None = "mean_tokens", **changes: Any
) -> transformers.PreTrainedModel:
    """Write a model with its tokenizer and, unless `mode` is None, sentence-transformers' files."""
    model = make_encoder(kind, head, **changes)
    model.save_pretrained(directory)
    save_word_pieces(directory, has_types=kind in ("Bert", "NomicBert", "Electra", "Albert"))
    if mode is not None:
        types = ("Transformer", "Pooling", "Normalize")
        listed = [
            {"idx": at, "name": str(at), "path": f"{at}_{name}" if at else "",
             "type": f"sentence_transformers.models.{name}"}
            for at, name in enumerate(types)
        ]  # fmt: skip
        (directory / "modules.json").write_text(json.dumps(listed))
        (directory / "1_Pooling").mkdir()
        flags = {"word_embedding_dimension": 64, f"pooling_mode_{mode}": True}
        (directory / "1_Pooling/config.json").write_text(json.dumps(flags))
    return model


def save_word_pieces(directory: Path, *, has_types: bool) -> None:
    """Write a tokenizer of letters and digits that wraps texts in [CLS] and [SEP] as BERT's does."""
    letters = [*string.ascii_lowercase, *string.digits, "-", " "]
    texts = [*_SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({text: at for at, text in enumerate(texts)}, unk_token="[UNK]")
    )
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.add_special_tokens(list(_SPECIAL))
    backend.save(str(directory / "tokenizer.json"))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": names if has_types else [names[0], names[2]],
        "model_max_length": 130,
        **{f"{name.strip('[]').lower()}_token": name for name in _SPECIAL},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def save_recorded(name: str, directory: Path) -> None:
    """Write a checkpoint whose vectors or scores are recorded."""
    kind, head, mode = RECORDED[name]
    changes = {} if mode else {"num_labels": 1}
    save_encoder(directory, kind, head, mode, **changes)
    fix_weights(directory)


def random_ids(length: int, seed: int = 0) -> list[int]:
    """Return random ids without special tokens."""
    found: list[int] = np.random.default_rng(seed).integers(5, 77, size=length).tolist()
    return found


def states_of(model: Any, ids: Sequence[int], second_start: int | None = None) -> torch.Tensor:
    """Return transformers' hidden states [n_tokens, hidden] for a text or a pair."""
    with torch.inference_mode():
        found: torch.Tensor = model.base_model(**_inputs(ids, second_start)).last_hidden_state[0]
    return found


def logits_of(model: Any, ids: Sequence[int], second_start: int | None = None) -> torch.Tensor:
    """Return transformers' logits for the labels."""
    with torch.inference_mode():
        found: torch.Tensor = model(**_inputs(ids, second_start)).logits[0]
    return found


def _inputs(ids: Sequence[int], second_start: int | None) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.tensor([list(ids)])}
    if second_start is not None:
        types = [int(at >= second_start) for at in range(len(ids))]
        inputs["token_type_ids"] = torch.tensor([types])
    return inputs
