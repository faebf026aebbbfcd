"""The sizes of latent attention, which `config.py` makes part of a layer. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

_MOST = 1 << 16
_BLOCK, _MOST_RANK, _MOST_WIDTH = 32, 512, 640  # as the kernels have them


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Latent attention (MLA): a token's keys and values are made of `rank` numbers, and one key turns.

    Each head of a query has `plain_dim` dims that do not turn, and `rotary_dim` behind them that do.
    """

    rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int  # of a head
    query_rank: int | None = None  # what queries are made of; None: of the activation itself
    is_interleaved: bool = False  # dims 2i and 2i + 1 turn together
    has_bias: bool = False  # of what makes latents, and what queries are made of

    @property
    def is_computed(self) -> bool:
        """Whether the kernels have its sizes."""
        sizes = (self.rank, self.plain_dim, self.rotary_dim, self.value_dim)
        return (
            all(size > 0 and size % _BLOCK == 0 for size in sizes)
            and self.rank <= _MOST_RANK
            and self.rank + self.rotary_dim <= _MOST_WIDTH
        )

    def refusal(self, turning: int | None) -> str | None:
        """Return why this cannot be computed with a rotary embedding of so many dims; None if it can."""
        for name in ("rank", "plain_dim", "rotary_dim", "value_dim", "query_rank"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MOST:
                return f"latent attention's {name} must be in 1..{_MOST}, got {value}"
        if not self.is_computed:
            return (
                f"latent attention takes multiples of {_BLOCK} as sizes, a kv_lora_rank up to {_MOST_RANK}, "
                f"and with it rotated dims up to {_MOST_WIDTH}, got {self}"
            )
        if turning != self.rotary_dim:
            return f"latent attention's {self.rotary_dim} rotated dims are not those of its rotary embedding"
        return None
