"""`--prompt-precision`: chooses the arithmetic of prompts, and reports what bfloat16 costs here."""

from __future__ import annotations

import logging

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.loading.open import OpenModel

logger = logging.getLogger(__name__)


def is_bfloat16(opened: OpenModel, wanted: str) -> bool:
    """Return whether a model's prompts are to be computed in bfloat16 on this CPU.

    Args:
        wanted: As `--prompt-precision`. "auto" decides by the set of kernels, never by a measurement, so that
            a second replica gives the same bits.

    Raises:
        ModelLoadError: if it is wanted of a model whose prompts cannot have an arithmetic of their own.
    """
    if wanted == "fp8":
        raise ModelLoadError("--prompt-precision fp8 is for GPUs: a CPU has no FP8 arithmetic")
    if wanted == "bfloat16" and opened.is_generic:
        raise ModelLoadError(
            "--prompt-precision bfloat16 needs a model that native code computes: "
            f"{opened.config.architecture} is computed by transformers' code, all of its tokens alike"
        )
    if wanted == "auto":
        return ops.kernel_set().has_tiles and not opened.is_generic
    return wanted == "bfloat16"


def log_effect(packing: ops.Packing) -> None:
    """Log whether bfloat16 prompts change anything for the packed weights, and what they cost here."""
    if not packing.by_kind:
        return logger.info("--prompt-precision bfloat16 changes nothing: no weight is multiplied as codes")
    [(name, _)] = packing.by_kind.most_common(1)
    ratio = ops.bfloat16_time_ratio(name)
    if ratio < 1.0:
        logger.info("prompts in bfloat16: a product of %s takes %.2f of its time in int8", name, ratio)
    else:
        logger.warning(
            "--prompt-precision bfloat16 slows prompts down on this machine: with %s kernels a product of %s "
            "takes %.1f times as long as in int8", ops.kernel_set().name, name, ratio,
        )  # fmt: skip
