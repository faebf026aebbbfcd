"""Encoders as llama.cpp's converter writes them to GGUF files.

made = make(CASES["bert"], folder)        # a checkpoint, and f32.gguf and q8_0.gguf beside it
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from tests.support.encoders import VOCAB_SIZE, save_encoder
from tests.support.family_files import convert
from tests.support.family_maker import save_tokenizer
from tgi_asgi.formats.sources import ModelFiles

_NO_RULES = struct.pack("<I", 1024) + bytes(1024) + b"\0"  # a charsmap whose trie has no leaf


@dataclass(frozen=True, slots=True)
class EncoderCase:
    """One encoder: its class of `transformers`, and what its published config.json has besides."""

    name: str
    kind: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    json: Mapping[str, Any] = field(default_factory=dict)
    head: str = "Model"
    save_tokens: Callable[[Path], None] | None = None  # None: WordPiece


@dataclass(frozen=True, slots=True)
class MadeEncoder:
    """A checkpoint in `folder`, the same in GGUF files, and the module that computes it."""

    folder: Path
    module: Any

    def file(self, form: str) -> ModelFiles:
        return ModelFiles("encoder", None, "gguf", self.folder / f"{form}.gguf")


def make(case: EncoderCase, folder: Path) -> MadeEncoder:
    """Write a checkpoint and convert it."""
    module = save_encoder(folder, case.kind, case.head, **case.changes)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **case.json}))
    if case.save_tokens is not None:
        case.save_tokens(folder)
    convert(folder, ("f32", "q8_0"), folder)
    return MadeEncoder(folder, module)


def save_unigram(folder: Path) -> None:
    """Write a tokenizer like XLM-RoBERTa's."""
    texts = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581s", "\u2581c", "\u2581t", "ab", "ort"]
    scored = [(text, 0.0) for text in ("<s>", "<pad>", "</s>", "<unk>")]
    scored += [(text, -3.0 - at / 10 + len(text)) for at, text in enumerate(texts)]
    scored += [(f"x{index}", -99.0) for index in range(VOCAB_SIZE - len(scored) - 1)] + [("<mask>", 0.0)]
    backend = tokenizers.Tokenizer(models.Unigram(scored, unk_id=3))
    backend.normalizer = normalizers.Precompiled(_NO_RULES)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    made = json.loads(backend.to_str())
    made["normalizer"]["precompiled_charsmap"] = base64.b64encode(_NO_RULES).decode()
    (folder / "tokenizer.json").write_text(json.dumps(made))
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "pad": "<pad>"}
    config = {f"{name}_token": text for name, text in names.items()}
    config |= {"tokenizer_class": "XLMRobertaTokenizer", "mask_token": "<mask>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


_NOMIC = {
    "n_positions": 8192, "max_trained_positions": 2048, "activation_function": "swiglu", "causal": False,
    "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "prenorm": False,
    "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None,
}  # fmt: skip
_BYTES: dict[str, Any] = {"vocab_size": 320}  # as many as `save_tokenizer` needs
CASES = {
    case.name: case
    for case in (
        EncoderCase("bert", "Bert"),
        EncoderCase("bert-unigram", "XLMRoberta", save_tokens=save_unigram),
        EncoderCase("nomic-bert", "NomicBert", {"layer_norm_eps": 1e-12}, _NOMIC),
        EncoderCase(
            "jina-bert-v3", "JinaEmbeddingsV3", {"type_vocab_size": 1},
            {"architectures": ["XLMRobertaModel"], "lora_adaptations": ["a"], "rotary_emb_base": 20000.0},
            save_tokens=save_unigram,
        ),
        EncoderCase(
            "modern-bert", "ModernBert", _BYTES, {"layer_norm_eps": 1e-5}, save_tokens=save_tokenizer
        ),
        EncoderCase(
            "eurobert", "EuroBert", _BYTES, {"classifier_pooling": "mean"}, save_tokens=save_tokenizer
        ),
        EncoderCase(
            "gemma-embedding", "Gemma3Text",
            {**_BYTES, "sliding_window": 16, "num_hidden_layers": 6, "query_pre_attn_scalar": 16},
            {"architectures": ["Gemma3TextModel"]}, save_tokens=save_tokenizer,
        ),
        EncoderCase(
            "bert-ranking", "XLMRoberta", {"num_labels": 1}, head="ForSequenceClassification",
            json={"id2label": {"0": "relevance"}}, save_tokens=save_unigram,
        ),
    )
}  # fmt: skip
