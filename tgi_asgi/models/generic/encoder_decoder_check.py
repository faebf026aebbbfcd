"""Self-check of a loaded encoder-decoder: random texts through one call of its own, and through steps.

In the one call, the decoder sees the whole answer at once, without a cache. As in `check.py`, both run on the
packed weights with float32 activations.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.check import LARGEST
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.generic.steps import BLOCK, flat_rows

_PROMPTS, _ANSWER, _CUT = (19, 7), 6, 11  # tokens; where the first prompt is cut
_RESUMED = 2  # tokens of the second answer that come with its prompt
_TOGETHER = (1, 2, 4)  # steps with a token of each answer
_Ids = npt.NDArray[np.int64]


def check(model: GenericModel) -> None:
    """Compare the logits of the two ways.

    Raises:
        ModelLoadError: if they differ, or the model does not run.
    """
    found = _tried(model)
    if found:
        model.is_batched = False  # the model's code has no positions for answers of several lengths
        found = _tried(model)
    if found:
        raise ModelLoadError(f"{model.config.architecture} {found}")


def _tried(model: GenericModel) -> str:
    """Return what is wrong with the model; empty if nothing is."""
    try:
        with model.replaced.mode.exactly():
            difference = _difference(model)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's code raises
        return f"does not run here: {type(error).__name__}: {str(error)[:300]}"
    if difference <= LARGEST:
        return ""
    return (
        f"fails its self-check against its own code: logits differ by {difference:.2g} of the largest; "
        f"{LARGEST:g} is allowed"
    )


def _difference(model: GenericModel) -> float:
    """Return the largest difference of logits, relative to the largest logit; NaN if one is."""
    pairs = [(_random_ids(model, size), _random_ids(model, _ANSWER)) for size in _PROMPTS]
    found, differences = _in_steps(model, pairs), []
    for index, (prompt, answer) in enumerate(pairs):
        expected = _whole(model, prompt, answer)
        differences.append(float((found[index] - expected).abs().max() / expected.abs().max()))
    return float(np.max(differences))


def _random_ids(model: GenericModel, size: int) -> _Ids:
    """Return random tokens without padding, which some models (M2M-100) give no position."""
    ids = np.random.default_rng(size).integers(0, model.config.vocab_size, size=size)
    padding = getattr(model.module.config, "pad_token_id", None)
    ids[ids == padding] = ((padding or 0) + 1) % model.config.vocab_size
    return ids


def _whole(model: GenericModel, prompt: _Ids, answer: _Ids) -> Tensor:
    """Return the logits after the prompt, and after each token of the answer but the last."""
    assert model.config.encoder_decoder is not None
    starts = model.config.encoder_decoder.starts
    device = model.backend.device
    ids = torch.tensor([[*starts, *answer[:-1].tolist()]], device=device)
    with torch.inference_mode():
        logits: Tensor = model.module(
            input_ids=torch.from_numpy(prompt)[None].to(device),
            attention_mask=torch.ones(1, len(prompt), device=device),
            decoder_input_ids=ids,
            decoder_attention_mask=torch.ones_like(ids),
            use_cache=False,
        ).logits
    return logits[0, len(starts) - 1 :, : model.config.vocab_size].float().cpu()


def _in_steps(model: GenericModel, pairs: list[tuple[_Ids, _Ids]]) -> list[Tensor]:
    """Return the same, from steps: a prompt in two chunks, another beside it, one resumed, single tokens."""
    program = model.program([], sum(_PROMPTS))
    for slot, (prompt, _) in enumerate(pairs):
        program.start(slot, prompt.tolist(), ())
    (first, answer), (second, other) = pairs
    resumed = np.concatenate((second, other[:_RESUMED]))  # as after a preemption
    width = -(-(max(_PROMPTS) + _ANSWER) // BLOCK)

    def logits(rows: list[tuple[int, _Ids, int]], wanted: list[int]) -> Tensor:
        return torch.from_numpy(program.run(flat_rows(rows, width), wanted).copy())

    logits([(0, first[:_CUT], 0)], [])
    rest = len(first) - _CUT
    at = rest + len(second) - 1
    begun = logits([(0, first[_CUT:], _CUT), (1, resumed, 0)], [rest - 1, *range(at, at + _RESUMED + 1)])
    found = [[begun[:1]], [begun[1:]]]
    done = _RESUMED
    for step in range(_ANSWER - 1):
        rows = [(0, answer[step : step + 1], len(first) + step)]
        if step in _TOGETHER:
            rows.append((1, other[done : done + 1], len(second) + done))
            done += 1
        each = logits(rows, list(range(len(rows))))
        for slot, _, _ in rows:
            found[slot].append(each[slot : slot + 1])
    return [torch.cat(parts) for parts in found]
