"""A module that contains the head is not taken for the decoder: it returns logits of one call's rows only."""

from __future__ import annotations

import torch

from tgi_asgi.models.generic.caller import Caller, decoders_of
from tgi_asgi.models.generic.modules import Head


def test_a_model_with_the_head_in_it_is_no_decoder() -> None:
    import transformers

    text = {"vocab_size": 99, "embed_dim": 32, "layers": 1, "attention_heads": 2, "ffn_dim": 48}
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
        "head_dim": 16,
    }  # fmt: skip
    config = transformers.Kosmos2_5Config(text_config=text, vision_config=vision, latent_query_num=4)
    model = transformers.Kosmos2_5ForConditionalGeneration(config).eval()
    assert [type(each).__name__ for each in decoders_of(model)] == ["Kosmos2_5TextTransformer"]
    head = Head(model.get_output_embeddings())
    model.set_output_embeddings(head)
    caller = Caller(model, head, 99, torch.device("cpu"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits[0]
        last, known = caller.compute([3], input_ids=ids, use_cache=False)
        others = caller.compute_more([0, 1, 2], known)
    assert torch.allclose(torch.cat([others, last]), wanted, atol=1e-5)
