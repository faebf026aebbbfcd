"""Writes a checkpoint of the shape of SmolVLM-256M-Instruct with random weights, a tokenizer and a processor.

It is as fast as the real model, but its output is meaningless; its context is longer, for texts that cost as
much as an image. Used by `bench.images`.
"""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path

VOCAB_SIZE = 49_280
TILE = 512  # pixels per side
_IMAGE, _ROUND, _WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
_SPECIAL = ["<s>", "</s>", "<pad>", _IMAGE, _ROUND, _WHOLE, *_TILES]
_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_checkpoint(folder: Path, longest_edge: int) -> None:
    """Write the checkpoint.

    Args:
        longest_edge: Size in pixels to which images are scaled before they are cut into tiles.
    """
    import torch
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    _save_tokenizer(folder)
    text = {
        "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "max_position_embeddings": 1 << 15, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": TILE, "patch_size": 16,
    }  # fmt: skip
    config = SmolVLMConfig(
        text_config=text,
        vision_config=vision,
        scale_factor=4,
        image_token_id=_SPECIAL.index(_IMAGE),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = SmolVLMForConditionalGeneration(config)
    model.bfloat16().save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": longest_edge},
        "max_image_size": {"longest_edge": TILE},
        "do_image_splitting": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_len": 64}))


def _save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of letters, and of as many beginnings of words as fit in the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    texts = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs: list[tuple[str, str]] = []
    for length in (1, 2, 3):
        starts = map("".join, itertools.product(string.ascii_lowercase, repeat=length))
        pairs += itertools.product(starts, string.ascii_lowercase)
    del pairs[VOCAB_SIZE - len(texts) :]
    vocabulary = {text: index for index, text in enumerate([*texts, *map("".join, pairs)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"image_token": _IMAGE, "fake_image_token": _ROUND, "global_image_token": _WHOLE}
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": "<pad>", "extra_special_tokens": names, "chat_template": _TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
