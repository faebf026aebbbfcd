"""Steps of whole prompts through a `transformers` module: their tokens' states, or a classifier's logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgi_asgi.models.generic.attention import running
from tgi_asgi.models.generic.whole import WholeLayers
from tgi_asgi.ops.arrays import Floats


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a prompt.

    Attributes:
        second_start: For a pair, the index of its second text's first token.
    """

    ids: Sequence[int]
    second_start: int | None = None


class EncoderProgram:
    """Computes prompts, each as if it were alone.

    Args:
        module: Module with its weights; it uses native attention if `layers` is given.
        layers: The attention layers; None: prompts run one after the other.
        device: Where the module is.
        first_position: Position of a prompt's first token.
        num_token_types: As in `EncoderConfig`.
        is_classifier: Whether the module has labels.
    """

    def __init__(
        self, module: Any, layers: WholeLayers | None, *, device: torch.device, first_position: int,
        num_token_types: int, is_classifier: bool,
    ) -> None:  # fmt: skip
        self._module, self._base, self._layers = module, module.base_model, layers
        self._device = device
        self._forward = type(self._base).forward.__get__(self._base)
        self._parameters = inspect.signature(self._forward).parameters
        self._first_position, self._num_types = first_position, num_token_types
        self._is_classifier = is_classifier
        self._given: Any = None
        if is_classifier:
            self._base.forward = self._stand_in

    def run(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Floats, Floats | None]]:
        """Yield each prompt's states [n_tokens, hidden] after the last norm, and a classifier's logits.

        Both may share memory with the next step's results.
        """
        with torch.inference_mode():
            for part in [prompts] if self._layers is not None else [[each] for each in prompts]:
                found = self._compute(part)
                start = 0
                for prompt in part:
                    stop = start + len(prompt.ids)
                    yield (
                        found.last_hidden_state[0, start:stop].float().cpu().numpy(),
                        self._logits(found, prompt, start, stop) if self._is_classifier else None,
                    )
                    start = stop

    def _compute(self, prompts: Sequence[Prompt]) -> Any:
        """Return the output of the model without its head for prompts laid out in one row."""
        inputs = {"input_ids": self._row([each.ids for each in prompts])}
        if self._num_types:  # without them, some models assume as many as they have positions
            inputs["token_type_ids"] = self._row([self._types(each) for each in prompts])
        if "use_cache" in self._parameters:
            inputs["use_cache"] = False  # type: ignore[assignment]
        if self._layers is None:
            return self._forward(**inputs)
        first = self._first_position
        lengths = [len(each.ids) for each in prompts]
        inputs["position_ids"] = self._row([range(first, first + length) for length in lengths])
        with running(self._layers):
            self._layers.begin(lengths)
            found = self._forward(**inputs)
            self._layers.end()
        return found

    def _types(self, prompt: Prompt) -> list[int]:
        num_tokens = len(prompt.ids)
        num_first = num_tokens if prompt.second_start is None or self._num_types < 2 else prompt.second_start
        return [0] * num_first + [1] * (num_tokens - num_first)

    def _logits(self, found: Any, prompt: Prompt, start: int, stop: int) -> Floats:
        """Return the labels' logits of one prompt; its part of `found` replaces the base model's output."""
        self._given = self._part(found, start, stop) if self._layers is not None else found
        try:
            logits = self._module(input_ids=self._row([prompt.ids])).logits[0]
        finally:
            self._given = None
        made: Floats = logits.float().cpu().numpy()
        return made

    def _part(self, found: Any, start: int, stop: int) -> Any:
        states = found.last_hidden_state[:, start:stop]
        pooler = getattr(self._base, "pooler", None)
        pooled = {} if pooler is None else {"pooler_output": pooler(states)}
        return type(found)(last_hidden_state=states, **pooled)

    def _row(self, parts: Sequence[Sequence[int]]) -> Tensor:
        joined = np.concatenate([np.asarray(part, np.int64) for part in parts])
        return torch.from_numpy(joined)[None].to(self._device)

    def _stand_in(self, *args: Any, **kwargs: Any) -> Any:
        """Replace the base model's `forward`: return the given output, if any, instead of computing."""
        return self._forward(*args, **kwargs) if self._given is None else self._given
