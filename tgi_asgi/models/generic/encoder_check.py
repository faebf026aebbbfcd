"""Self-check of a loaded encoder: random prompts in one batch, and each through the model's own forward.

Like `check.py` for decoders, it runs on the packed weights in float32. It detects prompts that see each
other, positions or segments of a pair that do not arrive, and windows that differ from what discovery found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.discover import implementation
from tgi_asgi.models.generic.encoder import EncoderModel
from tgi_asgi.models.generic.encoder_program import Prompt
from tgi_asgi.models.generic.zeros import arguments
from tgi_asgi.ops.arrays import Floats

_LENGTHS = (27, 14)
_LARGEST = 2e-3  # allowed difference, relative to the largest value
_LONGEST_WINDOW = 192  # longest window for which a longer prompt is affordable


def check(model: EncoderModel) -> None:
    """Compare the two results.

    Raises:
        ModelLoadError: if they differ; the message says by how much.
    """
    name = model.config.architecture
    try:
        worst, what = _difference(model)
        has_same_bits = model.is_batch_invariant and _has_same_bits(model)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's code raises on such a batch
        raise ModelLoadError(
            f"{name} does not run here: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    if worst <= _LARGEST:
        model.is_batch_invariant &= has_same_bits
    else:
        raise ModelLoadError(
            f"{name} fails its self-check against its own code: {what} differ by {worst:.2g} of the "
            f"largest; {_LARGEST:g} is allowed"
        )


def _difference(model: EncoderModel) -> tuple[float, str]:
    """Return the largest relative difference, and whether it is of states or logits."""
    prompts = _prompts(model)
    program = model.program(max_tokens=1024, max_rows=len(prompts), max_context=512)
    with model.replaced.mode.exactly():
        found = [
            (states.copy(), None if logits is None else logits.copy())
            for states, logits in program.run(prompts)
        ]
        pairs: list[tuple[str, Floats, Floats]] = []
        for prompt, (states, logits) in zip(prompts, found, strict=True):
            if states.shape != (len(prompt.ids), model.config.hidden_size):
                raise ValueError(
                    f"{len(prompt.ids)} tokens have states of shape {states.shape}, and its hidden size is "
                    f"{model.config.hidden_size}"
                )
            wanted_states, wanted_logits = _eager(model, prompt)
            pairs.append(("states", states, wanted_states))
            if logits is not None and wanted_logits is not None:
                pairs.append(("logits", logits, wanted_logits))
    differences = [(_relative(one, other), what) for what, one, other in pairs]
    return max(differences)


def _has_same_bits(model: EncoderModel) -> bool:
    """Return whether prompts' states at several offsets of a step have the bits that they have alone."""
    first, second = _prompts(model)
    prompts = [Prompt(first.ids[:5]), Prompt(first.ids[:1]), second, Prompt(second.ids[:2]), first]
    program = model.program(max_tokens=1024, max_rows=5, max_context=512)
    together = [states.copy() for states, _ in program.run(prompts)]
    alone = [states.copy() for prompt in prompts for states, _ in program.run([prompt])]
    return all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))


def _relative(found: Floats, wanted: Floats) -> float:
    if found.shape != wanted.shape or not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return float("inf")
    return float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-9))


def _prompts(model: EncoderModel) -> list[Prompt]:
    """Return random prompts, each a pair; the first exceeds the smallest window, if that is small."""
    reaches = [layer.reach for layer in model.config.layers]
    sizes = [size for each in reaches for size in (each.before, each.after) if size is not None]
    longest = max(_LENGTHS[0], min((size for size in sizes if 0 < size <= _LONGEST_WINDOW), default=0) + 11)
    generator = np.random.default_rng(0)
    padding = model.module.config.get_text_config().pad_token_id
    prompts = []
    for length in (longest, _LENGTHS[1]):
        ids = generator.integers(0, model.config.vocab_size, size=min(length, model.config.context_length))
        ids[ids == padding] = (padding + 1) % model.config.vocab_size if padding is not None else 0
        prompts.append(Prompt(ids.tolist(), len(ids) // 3))
    return prompts


def _eager(model: EncoderModel, prompt: Prompt) -> tuple[Floats, Floats | None]:
    """Return a prompt's states and logits, by the model's own attention and positions."""
    kept: list[Any] = []
    base = model.module.base_model
    hook = base.register_forward_hook(lambda module, inputs, output: kept.append(output))
    types, device = None, model.backend.device
    if model.config.num_token_types > 1 and prompt.second_start is not None:
        num_tokens, num_first = len(prompt.ids), prompt.second_start
        types = torch.tensor([[0] * num_first + [1] * (num_tokens - num_first)], device=device)
    given = {"input_ids": torch.tensor([list(prompt.ids)], device=device), "use_cache": False}
    try:
        with implementation(model.module, "eager"), torch.inference_mode():
            output = model.module(
                **arguments(model.module, **given), **({} if types is None else {"token_type_ids": types})
            )
    finally:
        hook.remove()
    states = kept[-1].last_hidden_state[0].float().cpu().numpy()
    return states, output.logits[0].float().cpu().numpy() if model.config.num_labels else None
