"""Encoder-decoders of two models, each with a configuration of its own (`EncoderDecoderModel`, T5Gemma)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.generic.test_encoder_decoders import EQUAL, in_steps, load, random_pairs
from tests.models.generic.test_http import serving
from tests.support import encoder_decoders
from tests.support.architectures import config, random_ids
from tests.support.generic import open_generic
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.modules import Embedding

MANY = pytest.mark.models
# Encoder, decoder, and whether the answers are computed together.
PAIRS = [
    ("bert", "roberta", True),
    pytest.param("roberta", "gpt2", True, marks=MANY),
    pytest.param("bert-generation", "bert-generation", True, marks=MANY),
    pytest.param("electra", "xlm-roberta", True, marks=MANY),
    pytest.param("big_bird", "bert", True, marks=MANY),
    pytest.param("bert", "roformer", False, marks=MANY),
]


def part(model_type: str, **more: Any) -> dict[str, Any]:
    return {**config(model_type).to_dict(), **more}


def make(encoder: dict[str, Any], decoder_type: str, folder: Path) -> Path:
    decoder = part(decoder_type, is_decoder=True, add_cross_attention=True)
    encoder_decoders.make("encoder-decoder", folder, encoder=encoder, decoder=decoder)
    return folder


def check_answers(folder: Path, *, is_batched: bool) -> Any:
    model, pairs = load(folder), random_pairs()
    assert model.is_batched == is_batched
    for found, expected in zip(
        in_steps(model, pairs), encoder_decoders.references(folder, pairs), strict=True
    ):
        assert np.abs(found - expected).max() / np.abs(expected).max() < EQUAL
    return model


@pytest.mark.parametrize(("encoder", "decoder", "is_batched"), PAIRS)
def test_any_encoder_may_have_any_decoder(
    encoder: str, decoder: str, is_batched: bool, tmp_path: Path
) -> None:
    folder = make(part(encoder, is_decoder=False), decoder, tmp_path)
    model = check_answers(folder, is_batched=is_batched)
    for side in (model.module.get_encoder(), model.module.get_decoder()):
        assert isinstance(side.get_input_embeddings(), Embedding)


def test_an_encoder_may_be_wider_than_its_decoder(tmp_path: Path) -> None:
    check_answers(make(part("bert", is_decoder=False, hidden_size=96), "bert", tmp_path), is_batched=True)


def test_a_decoder_whose_code_fails_with_a_cache_is_refused(tmp_path: Path) -> None:
    folder = make(part("bert", is_decoder=False), "megatron-bert", tmp_path)
    with pytest.raises(ModelLoadError, match="EncoderDecoderModel does not run here: RuntimeError"):
        load(folder)


def test_prompt_and_answer_are_as_long_as_each_model_s_own_positions(tmp_path: Path) -> None:
    """RoBERTa's table begins with those of padding, which no token has."""
    encoder = part("roberta", is_decoder=False, max_position_embeddings=24, pad_token_id=2)
    folder = make(encoder, "bert", tmp_path)
    with open_generic(folder) as opened:
        pair = opened.config.encoder_decoder
        assert pair is not None and (pair.max_prompt, pair.max_answer) == (21, 512)
    ids = random_ids(22, 1)
    model: Any = encoder_decoders.open_reference(folder)
    expected = model.generate(torch.tensor([ids[:21]]), max_new_tokens=6, do_sample=False)
    with serving(folder) as client:
        body = {
            "model": "any",
            "prompt": ids[:21],
            "max_tokens": 6,
            "temperature": 0,
            "return_token_ids": True,
        }
        answer = client.post("/v1/completions", json=body).json()
        assert answer["choices"][0]["token_ids"] == expected[0, 1:].tolist()
        assert client.post("/v1/completions", json=body | {"prompt": ids}).status_code == 400


@pytest.mark.parametrize("model_type", ["t5gemma", "t5gemma2"])
def test_a_prompt_of_t5gemma_is_as_long_as_its_encoder_s_positions(model_type: str, tmp_path: Path) -> None:
    sizes, longer = encoder_decoders.TYPES[model_type], {"max_position_embeddings": 4000}
    encoder = sizes["encoder"] | longer
    if "text_config" in encoder:
        encoder = sizes["encoder"] | {"text_config": sizes["encoder"]["text_config"] | longer}
    encoder_decoders.make(model_type, tmp_path, encoder=encoder)
    with open_generic(tmp_path) as opened:
        pair = opened.config.encoder_decoder
        assert pair is not None and (pair.max_prompt, pair.max_answer) == (4000, 512)
