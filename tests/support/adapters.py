"""LoRA adapters made with `peft` over small checkpoints, and their float32 reference outputs.

Their values are exact in bfloat16 unless asked otherwise, so loading rounds nothing. They are large enough
that a missing or wrong adapter changes the results visibly.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

ALL_PRODUCTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_SIZE = 0.08  # standard deviation of the values of both matrices


def make_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int,
    is_rounded: bool = True,
    num_tokens: int | None = None,
    **config: Any,
) -> Path:
    """Write an adapter of random values for a checkpoint; `config` goes to `LoraConfig`.

    Its magnitudes, if it is DoRA's, and its whole modules differ from the base's, too.

    Args:
        num_tokens: Size of the vocabulary that the base is given first; `peft` then saves the embeddings.
    """
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ALL_PRODUCTS, **config}
    with _peft() as peft, torch.no_grad():
        opened = _open(base)
        if num_tokens is not None:
            opened.resize_token_embeddings(num_tokens, mean_resizing=False)
        model = peft.get_peft_model(opened, peft.LoraConfig(task_type="CAUSAL_LM", **config))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape) * _SIZE
                parameter.copy_(values.bfloat16().float() if is_rounded else values)
            elif any(part in name for part in ("modules_to_save", "trainable_tokens_delta")) or (
                name.endswith(".bias") and parameter.requires_grad
            ):
                parameter.add_(torch.randn(parameter.shape) * _SIZE)
        model.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]], rank: int = 4, **config: Any) -> Path:
    """Write an adapter without a model; `shapes` maps each path in the file to (rows, columns)."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * _SIZE
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * _SIZE
    save_file(tensors, folder / "adapter_model.safetensors")
    given = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **config}
    (folder / "adapter_config.json").write_text(json.dumps(given), encoding="utf-8")
    return folder


def peft_logprobs(base: Path, adapter: Path | None, ids: list[int]) -> np.ndarray:
    """Return the log-probabilities [n_tokens, vocab] float32 after each token."""
    [logits] = peft_logits(base, adapter, ids)
    found: np.ndarray = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    return found


def peft_logits(base: Path, adapter: Path | None, *sequences: list[int]) -> list[np.ndarray]:
    """Return for each sequence the logits [n_tokens, vocab] float32 after each token."""
    model = _open(base)
    with _peft() as peft, torch.inference_mode():
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, adapter)
        computed = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences]
    return [logits.float().numpy() for logits in computed]


def peft_merged(base: Path, adapter: Path, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a base in this dtype after `peft` has merged the adapter into it."""
    with _peft() as peft:
        merged = peft.PeftModel.from_pretrained(_open(base, dtype), adapter).merge_and_unload()
    found: Mapping[str, torch.Tensor] = merged.state_dict()
    return found


@contextmanager
def _peft() -> Iterator[Any]:
    """Import `peft`, ignoring warnings about names of `transformers` that it uses and that are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        yield peft


def _open(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, attn_implementation="eager"
    ).eval()
