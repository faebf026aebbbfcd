"""Attention of `transformers` on the paged cache: the function that its models call, and the running step.

`transformers` passes queries, keys and values of one sequence, [1, heads, tokens, dims]; here these are the
flat batch of a step. The step is not passed as an argument, because models drop arguments that they do not
know: it is stored per thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tgi_asgi import ops
from tgi_asgi.models.generic.backend import Backend, Paged
from tgi_asgi.models.generic.discover import AttentionLayer

NAME = "tgi"
_running = threading.local()


class PagedLayers:
    """The attention layers of a model over a pool of blocks.

    Args:
        layers: Layers in the order in which a step calls them.
        caches: Cache of each layer, of a pool of the backend's.
    """

    def __init__(
        self, layers: Sequence[AttentionLayer], caches: Sequence[Any], max_context: int, backend: Backend
    ) -> None:
        self._layers, self._caches = layers, caches
        self._specs: list[ops.AttentionSpec | None] = [None] * len(layers)
        self._backend, self._max_context = backend, max_context
        self._paged = backend.paged(max_context)
        self._paged_ahead: Paged | None = None  # created when first needed
        self._ahead: Paged | None = None  # for this step's layers with windows
        self._positions = torch.empty(0)
        self._next = 0

    def begin(self, batch: ops.FlatRows) -> None:
        """Begin a step."""
        self._paged.begin(batch)
        self._ahead = None
        self._positions = torch.from_numpy(batch.positions).to(self._backend.device)
        self._next = 0

    def look_ahead(self, batch: ops.FlatRows, visible_until: Tensor, *, in_windows: bool) -> None:
        """Let a step's tokens see later tokens, as in `PagedAttention.begin`; call it after `begin`.

        Args:
            in_windows: Whether this applies only to layers with a window.
        """
        if not in_windows:
            self._paged.begin(batch, visible_until)
            return
        if self._paged_ahead is None:
            self._paged_ahead = self._backend.paged(self._max_context)
        self._ahead = self._paged_ahead
        self._ahead.begin(batch, visible_until)

    def end(self) -> None:
        """End a step.

        Raises:
            RuntimeError: if it made another number of calls than discovery found.
        """
        if self._next != len(self._layers):
            raise RuntimeError(f"a step called attention {self._next} times, not {len(self._layers)}")

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Write keys and values to the step's slots, and attend: [1, tokens, heads, value dims]."""
        index = self._next
        self._next += 1
        if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
            query = query * _temperature_correction(module, self._positions)[:, None]
        spec = self._specs[index]
        if spec is None:
            layer = self._layers[index]
            spec = spec_of(kwargs, scale=layer.scale, window=layer.rule.window, chunk=layer.rule.chunk)
            self._specs[index] = spec
        paged = self._ahead if self._ahead is not None and spec.window is not None else self._paged
        rows = paged.run(self._caches[index], by_token(query), by_token(key), by_token(value), spec)
        return rows[None], None


def _temperature_correction(module: Any, positions: Tensor) -> Tensor:
    """Return the factor that corrects Llama 4's query temperature for the tokens' true positions.

    Its layers without rotary embedding scale queries by a factor that their code derives from a
    token's index in the batch.
    """

    def factor(at: Tensor) -> Tensor:
        logs = torch.log1p(torch.floor((at.float() + 1.0) / float(module.floor_scale)))
        return logs * float(module.attn_scale) + 1.0

    return factor(positions) / factor(torch.arange(len(positions), device=positions.device))


def spec_of(
    kwargs: Mapping[str, Any], *, scale: float, window: int | None, chunk: int | None = None
) -> ops.AttentionSpec:
    """Return how a layer attends, from the arguments of its calls."""
    sinks, slopes = kwargs.get("s_aux"), kwargs.get("slopes")
    return ops.AttentionSpec(
        scale=scale,
        window=window,
        chunk=chunk,
        soft_cap=kwargs.get("softcap"),
        sinks=None if sinks is None else sinks.detach().float().reshape(-1).cpu().numpy(),
        slopes=None if slopes is None else slopes.detach().float().contiguous().cpu().numpy(),
    )


def by_token(heads: Tensor) -> Tensor:
    """Return heads as [tokens, heads, dims] from the layout of `transformers`, [1, heads, tokens, dims]."""
    return heads[0].transpose(0, 1)


@contextlib.contextmanager
def running(layers: Any) -> Iterator[None]:
    """Direct this thread's attention calls to these layers."""
    before = getattr(_running, "layers", None)
    _running.layers = layers
    try:
        yield
    finally:
        _running.layers = before


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    found: tuple[Tensor, None] = _running.layers.attend(module, query, key, value, attention_mask, **kwargs)
    return found


def _experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor, **_: Any) -> Tensor:
    found: Tensor = module.tgi_experts.forward(module, hidden, index, weights)
    return found


def install(configs: Iterable[Any], *, attends: bool) -> None:
    """Let modules with these configurations call the functions here, for attention only if it `attends`.

    `transformers` knows no mask function of this name, so no masks are built.
    """
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    AttentionInterface.register(NAME, _attend)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
    for config in configs:
        config._experts_implementation_internal = NAME
        if attends:
            config._attn_implementation_internal = NAME
