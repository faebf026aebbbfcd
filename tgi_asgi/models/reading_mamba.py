"""Reads what configurations say about Mamba 1 and 2."""

from __future__ import annotations

import math

from tgi_asgi.errors import check
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.reader import Reader, as_float
from tgi_asgi.models.reading import read_bias
from tgi_asgi.models.recurrent_specs import ChannelsSpec, MambaSpec


def read_mamba(reader: Reader, hidden: int, width: int = 0) -> MambaSpec:
    """Read the specification of a recurrent layer; a config.json may state its width apart."""
    heads = reader.integer("mamba_n_heads", 128)
    if reader.is_gguf:
        width = reader.integer("ssm.inner_size", 2 * hidden)
    else:
        expansion = reader.integer("mamba_expand", 2)
        width = width or expansion * hidden
    check(heads > 0 and width > 0, f"the heads of states must be positive: {heads} of {width} channels")
    check_computed(width % heads == 0, f"{heads} heads of states cannot share {width} channels")
    reader.ignore("mamba_d_head", "mamba_chunk_size")  # derived from others; a kernel's block size
    conv_bias = read_bias(reader, "mamba_conv_bias", "ssm_conv1d", default=True)
    bias = read_bias(reader, "mamba_proj_bias", "ssm_in")
    return MambaSpec(
        num_heads=heads, head_dim=width // heads, num_groups=reader.integer("mamba_n_groups", 1),
        state_size=reader.integer("mamba_d_state", 256), num_taps=reader.integer("mamba_d_conv", 4),
        has_conv_bias=conv_bias, has_input_bias=bias, has_output_bias=bias, dt_limit=_read_limit(reader),
    )  # fmt: skip


def read_heads_of_states(
    reader: Reader, *, heads: str, head_dim: str, state: str, least_step: float | None = None
) -> MambaSpec:
    """Read the specification of models whose keys are those of transformers' Mamba 2.

    Args:
        heads, head_dim, state: Keys of their number, and of the sizes of heads and states.
        least_step: Lower limit of time steps, which have no upper one; None: the file has both.
    """
    num_heads, num_groups = reader.integer(heads), reader.integer("n_groups", 8)
    bias = reader.flag("use_bias", False)
    limit = _read_limit(reader)
    return MambaSpec(
        num_heads=num_heads, head_dim=reader.integer(head_dim), num_groups=num_groups,
        state_size=reader.integer(state), num_taps=reader.integer("conv_kernel", 4),
        has_conv_bias=reader.flag("use_conv_bias", True), has_input_bias=bias, has_output_bias=bias,
        dt_limit=limit if least_step is None else (least_step, math.inf),
    )  # fmt: skip


def read_channels(
    reader: Reader, hidden: int, *, width: int, state: str, taps: str, rank: str, conv_bias: str, bias: str,
    norm_eps: float | None, has_norm_weights: bool = False,
) -> ChannelsSpec:  # fmt: skip
    """Read the specification of a recurrent layer of Mamba 1, whose defaults all models share.

    Args:
        state, taps, rank, conv_bias, bias: Keys of config.json.
        norm_eps, has_norm_weights: As in the result.
    """
    given = reader.get(rank)
    num_steps = -(-hidden // 16) if given in (None, "auto") else reader.integer(rank)
    return ChannelsSpec(
        width=width, state_size=reader.integer(state, 16), rank=num_steps,
        num_taps=reader.integer(taps, 4), has_conv_bias=reader.flag(conv_bias, True),
        has_bias=reader.flag(bias, False), norm_eps=norm_eps, has_norm_weights=has_norm_weights,
    )  # fmt: skip


def _read_limit(reader: Reader) -> tuple[float, float]:
    """Read the limits of time steps; `transformers` writes infinity as an object."""
    given = reader.get("time_step_limit") or (0.0, math.inf)
    check(
        isinstance(given, list | tuple) and len(given) == 2,
        f"time_step_limit must be two numbers, got {str(given)[:100]}",
    )
    limits = [math.inf if each == {"__float__": "Infinity"} else each for each in given]
    check(
        all(type(each) in (int, float) for each in limits),
        f"time_step_limit must be two numbers, got {str(given)[:100]}",
    )
    return as_float(limits[0]), as_float(limits[1])
