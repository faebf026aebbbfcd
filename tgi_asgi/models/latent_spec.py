"""The sizes of latent attention (MLA), which are part of a layer in `config.py`. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

_MOST = 1 << 16
_BLOCK, _MAX_RANK, _MAX_WIDTH = 32, 512, 640  # limits of the kernels


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Latent attention (MLA): a token's keys and values derive from `rank` numbers and one rotated key.

    Each query head has `plain_dim` dims without rotation, followed by `rotary_dim` rotated dims.
    """

    rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int  # per head
    query_rank: int | None = None  # of the queries' latent; None: queries use the activation itself
    is_interleaved: bool = False  # whether dims 2i and 2i + 1 rotate together
    has_bias: bool = False  # of the products that make the latents

    def refusal(self, rotary_dim: int | None) -> str | None:
        """Return why this cannot be computed with a rotary embedding of `rotary_dim` dims; None if it can."""
        for name in ("rank", "plain_dim", "rotary_dim", "value_dim", "query_rank"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MOST:
                return f"latent attention's {name} must be in 1..{_MOST}, got {value}"
        sizes = (self.rank, self.plain_dim, self.rotary_dim, self.value_dim)
        has_blocks = not any(size % _BLOCK for size in sizes)
        if not has_blocks or self.rank > _MAX_RANK or self.rank + self.rotary_dim > _MAX_WIDTH:
            return (
                f"latent attention needs multiples of {_BLOCK} as sizes, a kv_lora_rank up to {_MAX_RANK}, "
                f"and up to {_MAX_WIDTH} together with the rotated dims, got {self}"
            )
        if rotary_dim != self.rotary_dim:
            return f"latent attention's {self.rotary_dim} rotated dims are not those of its rotary embedding"
        return None
