"""The operator `image_rows`, and what images bring to a step for it, laid out for the kernels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tgi_asgi import _C
from tgi_asgi.ops import calls, layout
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.recorder import Kind, Value, recorder_of

Ints = npt.NDArray[np.int64]
_NONE = np.empty(0, np.int64)


class ImageRows:
    """Rows of images for `image_rows`, and where the step's tokens are in rotary tables and attention.

        batch.set_images(ImageRows(tokens, rows).native, pad_id)

    Args:
        tokens: [n], ascending indices of the step's tokens that have rows.
        rows: float32 [levels, n, hidden].
        rotary: [n_tokens], each token's row of the rotary table; -1 - i: row i of the step's own table.
            Empty: tokens are where their positions are, moved by their slots' shifts.
        cosines, sines: float32 [m, rotary_dim / 2], the step's own table.
        visible_until: [n_tokens], the end of the positions that a token sees if that is after its own, in
            layers whose spec `sees_ahead`. Empty: no token sees later ones.

    Raises:
        ValueError: if tokens do not ascend, or a shape does not fit. Running the step checks the rest.
    """

    __slots__ = ("native",)

    def __init__(
        self,
        tokens: Ints,
        rows: Floats,
        *,
        rotary: Ints = _NONE,
        cosines: Floats | None = None,
        sines: Floats | None = None,
        visible_until: Ints = _NONE,
    ) -> None:
        self.native = _C.ImageRows(
            tokens=tokens, rows=layout.padded(rows), rotary=rotary,
            cosines=None if cosines is None else _padded_angles(cosines, 1.0),
            sines=None if sines is None else _padded_angles(sines, 0.0),
            visible_until=visible_until,
        )  # fmt: skip


def image_rows(x: Value, level: int = 0) -> Value:
    """Bring images' rows into the residual [n_tokens, hidden]; return it.

    The rows of level 0 replace those of their tokens, and those of a higher level are added to them, as
    Qwen3-VL does after its first layers. Each step brings its own (`ImageRows`), or none.

    Raises:
        ValueError: if the level is negative.
    """
    if level < 0:
        raise ValueError(f"`level` must not be negative, got {level}")
    recorder = recorder_of("image_rows", x=(x, Kind.RESIDUAL, None))
    return recorder.note(calls.ImageRows(recorder.added(x), x, level))


def _padded_angles(table: Floats, value: float) -> Floats:
    """Return rows of angles with those of pairs that do not turn, as the kernels' tables have them."""
    return layout.pad_columns(table, -table.shape[1] % layout.PANEL, value)
