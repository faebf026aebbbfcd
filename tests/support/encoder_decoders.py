"""Tiny random checkpoints of encoder-decoders, and what `transformers` computes with them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from tests.support import architectures
from tests.support.architectures import config as config_of_type
from tests.support.architectures import one_thread, random_ids, randomise, save_tokenizer

_LAST_NORM = re.compile(r"decoder\.(.*\.)?(final_layer_norm|layer_norm|LayerNorm|norm|ln_f)\.weight$")
START, END, PAD = 0, 1, 2
# What differs from `architectures.config` in each type.
_T5 = {"d_kv": 16, "d_ff": 96, "num_decoder_layers": 3}
_GEMMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "sliding_window": 12,
    "max_position_embeddings": 512, "query_pre_attn_scalar": 16, "pad_token_id": 2,
}  # fmt: skip
_GEMMA2 = {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_BERT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": 320, "max_position_embeddings": 512, "pad_token_id": 2,
}  # fmt: skip
TYPES: Mapping[str, Mapping[str, Any]] = {
    "bart": {},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blenderbot": {},
    "blenderbot-small": {},
    "encoder-decoder": {
        "encoder": {"model_type": "bert", **_BERT},
        "decoder": {"model_type": "bert", **_BERT, "is_decoder": True, "add_cross_attention": True},
    },
    "fsmt": {"langs": ["en", "de"], "src_vocab_size": 320, "tgt_vocab_size": 320},
    "led": {
        "attention_window": [8, 8, 8],
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
    },
    "longt5": {**_T5, "local_radius": 4},
    "m2m_100": {},
    "marian": {"decoder_vocab_size": 320},
    "mbart": {},
    "mt5": _T5,
    "mvp": {},
    "nllb-moe": {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "pegasus": {},
    "pegasus_x": {"block_size": 4, "num_global_tokens": 2},
    "plbart": {},
    "prophetnet": {},
    "switch_transformers": {**_T5, "num_experts": 4},
    "t5": _T5,
    "t5gemma": {
        "encoder": _GEMMA,
        "decoder": {**_GEMMA, "cross_attention_hidden_size": 64},
        "vocab_size": 320,
    },
    "t5gemma2": {
        "encoder": {
            "text_config": _GEMMA2,
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 316,
            "eoi_token_index": 317,
        },
        "decoder": _GEMMA2,
        "image_token_index": 318,
    },
    "umt5": _T5,
}


# Types whose code takes no mask of the answers, so that each is computed alone.
ALONE = frozenset({"led"})
# Types that are not served, and what the server says.
REFUSED = {
    "fsmt": "cannot be served: it reads and writes in two vocabularies",
    "prophetnet": "cannot be served: it computes other logits where several tokens of an answer come at once",
}


@one_thread()
def make(model_type: str, folder: Path, **options: Any) -> None:
    """Write a checkpoint with a tokenizer; the same type always yields the same checkpoint."""
    torch.manual_seed(zlib.crc32(model_type.encode()))
    made = config_of_type(model_type)
    particular = {
        **TYPES[model_type],
        "decoder_start_token_id": START,
        "forced_eos_token_id": None,
        **options,
    }
    made = CONFIG_MAPPING[model_type](**{**made.to_dict(), "is_decoder": False, **particular})
    made._attn_implementation = "eager"
    kind = getattr(transformers, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES[model_type])
    model = kind(made).eval()
    with torch.no_grad():
        randomise(model)
        for name, value in model.named_parameters():
            if name.endswith(".q.weight"):  # T5 divides no score by the root of a head's size
                value *= made.d_kv**-0.5
        if model_type not in REFUSED:
            _spread(model)
    model.generation_config.update(decoder_start_token_id=START, eos_token_id=END, pad_token_id=PAD)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def _spread(model: Any) -> None:
    """Scale the head, or the norm before a tied one, so that the logits' spread is about 3."""
    ids = torch.tensor([random_ids(20, 0)])
    tied = model.get_output_embeddings().weight is model.get_decoder().get_input_embeddings().weight
    norms = [value for name, value in model.named_parameters() if _LAST_NORM.search(name)]
    weight = norms[-1] if tied else model.get_output_embeddings().weight
    for _ in range(4):
        weight *= 3 / model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits.std()


def open_reference(folder: Path) -> transformers.PreTrainedModel:
    """Return transformers' own model, as `architectures.open_reference`."""
    return architectures.open_reference(folder, transformers.AutoModelForSeq2SeqLM)


@one_thread()
def references(folder: Path, pairs: Iterable[tuple[list[int], list[int]]]) -> list[np.ndarray]:
    """Return the logits [n_answer, vocab] of each answer's tokens after its prompt, all in one call."""
    model = open_reference(folder)
    found = []
    for prompt, answer in pairs:
        ids = torch.tensor([[START, *answer[:-1]]])
        with torch.inference_mode():
            given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": ids, "use_cache": False}
            found.append(model(**given).logits[0].float().numpy())
    return found
