"""Calls a whole module of `transformers` for the logits of some tokens, and later for those of others.

Used by the programs of decoders (`program.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tgi_asgi.models.generic.modules import Head
from tgi_asgi.models.generic.zeros import arguments


class Caller:
    """Calls a whole module and keeps its decoder's output, from which a step's further logits are computed.

    Args:
        model: Model with its weights.
        head: The model's head, which computes only the requested rows.
        device: Where the model is.
        decode: Function that replaces the decoder and everything before it.
    """

    def __init__(
        self, model: Any, head: Head, vocab_size: int, device: torch.device,
        decode: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        self._model, self._head, self._vocab_size = model, head, vocab_size
        self._device = device
        self._instead = decode
        self._output: Any = None
        self._is_calling = False
        for decoder in decoders_of(model):
            decoder.forward = functools.partial(self._forward, type(decoder).forward.__get__(decoder))

    def compute(self, rows: Iterable[int], **inputs: Any) -> tuple[Tensor, Any]:
        """Return the logits [n_rows, vocab] of these tokens, and the decoder output for `compute_more`."""
        self._output, self._is_calling = None, True
        try:
            return self._call(rows, **inputs), self._output
        finally:
            self._output, self._is_calling = None, False

    def compute_more(self, rows: Iterable[int], output: Any) -> Tensor:
        """Return the logits of other tokens of an earlier call.

        Raises:
            RuntimeError: if that call returned no decoder output.
        """
        if output is None:
            raise RuntimeError("the last step has no decoder output, only logits")
        self._output, self._is_calling = output, True
        try:
            return self._call(rows, input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._device))
        finally:
            self._output, self._is_calling = None, False

    def _call(self, rows: Iterable[int], **inputs: Any) -> Tensor:
        self._head.rows = torch.tensor(list(rows), dtype=torch.long, device=self._device)
        try:
            logits: Tensor = self._model(**arguments(self._model, **inputs)).logits
        finally:
            self._head.rows = None
        return of_vocabulary(logits[0].float(), self._vocab_size).contiguous()

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replace a decoder's `forward`: record the output of the outermost call, or return it."""
        if not self._is_calling:
            return forward(*args, **kwargs)
        if self._output is None:
            self._is_calling = False
            self._output = (self._instead or forward)(*args, **kwargs)
        return self._output


def of_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """Return logits [n_rows, vocab_size]: without those of padding (Inkling), with the smallest number for
    ids that are only read (Mllama's token of an image)."""
    missing = max(vocab_size - logits.shape[-1], 0)
    found = torch.nn.functional.pad(logits, (0, missing), value=torch.finfo(logits.dtype).min)
    return found[:, :vocab_size]


def decoders_of(model: Any) -> list[Any]:
    """Return the models that a module may call for the head's input: those that contain its embedding.

    `get_decoder` is not reliable: Llama 4 returns itself, ModernBERT a product. A model that also contains
    the head, as in Kosmos 2.5, is left out: it returns logits, only of the rows of its last call.
    """
    from transformers import PreTrainedModel

    embedding = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embedding)
    parts = path.split(".")[:-1]
    around = (model.get_submodule(".".join(parts[: count + 1])) for count in range(len(parts)))
    head = model.get_output_embeddings()
    return [
        module
        for module in around
        if isinstance(module, PreTrainedModel) and all(each is not head for each in module.modules())
    ]
