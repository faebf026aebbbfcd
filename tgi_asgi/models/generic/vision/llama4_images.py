"""Equivalent of Llama 4's image processor, which `transformers` has only for torchvision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from tgi_asgi.models.generic.vision.torch_images import TorchImages, flat, pixels_of

_BILINEAR = 2
_MAX_SIDE, _MAX_TILES = 4096, 256


class Llama4Images(TorchImages):
    """`Llama4ImageProcessor`: an image as tiles, padded with black; if several, then also all of it.

    The arithmetic is the original's, in which some numbers are tensors in float32: a side that is rounded
    down may depend on that. Colours are scaled in bfloat16.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"height": 336, "width": 336},
        "max_patches": 16,
        "resize_to_max_canvas": False,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    fixed: ClassVar[Mapping[str, Any]] = {"resample": _BILINEAR, "do_normalize": True}

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        size, most = self.values["size"], self.values["max_patches"]
        side = size.get("height") if isinstance(size, dict) else None
        if type(side) is not int or not 0 < side <= _MAX_SIDE or size.get("width") != side:
            raise ValueError(f"size must be a square of 1 to {_MAX_SIDE} pixels, got {str(size)[:100]}")
        if type(most) is not int or not 0 < most <= _MAX_TILES:
            raise ValueError(f"max_patches must be in 1..{_MAX_TILES}, got {str(most)[:100]}")
        for name in ("image_mean", "image_std"):
            colours = self.values[name]
            if (
                not isinstance(colours, list)
                or len(colours) != 3
                or {type(each) for each in colours} - {int, float}
            ):
                raise ValueError(f"{name} must be three numbers, got {str(colours)[:100]}")
        self._side, self._grids = side, torch.tensor(_grids(most)) * side

    def __call__(self, images: Sequence[Any], **_: Any) -> dict[str, Any]:
        """Return tiles [tiles, 3, side, side] of all images, and [images, 2] their rows and columns."""
        tiles, grids = [], []
        for image in flat(images):
            made, grid = self._tiles(pixels_of(image))
            tiles.append(made)
            grids.append(grid)
        return {"pixel_values": torch.cat(tiles).float(), "aspect_ratios": torch.tensor(grids)}

    def _tiles(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return an image's tiles, and their rows and columns."""
        height, width = pixels.shape[-2:]
        canvas = self._canvas(height, width)
        high, wide = map(int, canvas)
        fitted = _resized(pixels, self._fitting(height, width, canvas))
        fitted = self._normal(pad(fitted, (0, wide - fitted.shape[3], 0, high - fitted.shape[2])))
        side = self._side
        rows, columns = high // side, wide // side
        cut = fitted.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4)
        tiles = cut.reshape(rows * columns, 3, side, side)
        if rows * columns > 1:
            tiles = torch.cat([tiles, self._normal(_resized(pixels, (side, side)))])
        return tiles, (rows, columns)

    def _canvas(self, height: int, width: int) -> Tensor:
        """Return the height and width of the tiles that enlarge an image least, or else shrink it least."""
        grids = self._grids
        scales = torch.minimum(grids[:, 0] / height, grids[:, 1] / width)
        larger = scales[scales >= 1]
        if len(larger):
            chosen = larger.max() if self.values["resize_to_max_canvas"] else larger.min()
        else:
            chosen = scales.max()
        fitting = grids[scales == chosen]
        return fitting[fitting.prod(dim=1).argmin()]

    def _fitting(self, height: int, width: int, canvas: Tensor) -> tuple[int, int]:
        """Return the height and width of an image in its proportions within a canvas.

        A small image is not enlarged beyond one tile, unless the files ask for it.
        """
        high, wide = canvas
        if not self.values["resize_to_max_canvas"]:
            high, wide = min(max(height, self._side), high), min(max(width, self._side), wide)
        scale_wide, scale_high = wide / width, high / height
        if scale_wide < scale_high:
            high = min(math.floor(height * scale_wide), high)
        else:
            wide = min(math.floor(width * scale_high), wide)
        return max(int(high), 1), max(int(wide), 1)

    def _normal(self, pixels: Tensor) -> Tensor:
        """Return colours as the model takes them, in bfloat16."""
        scaled = self._scaled(pixels.to(torch.bfloat16))
        mean, std = (
            torch.as_tensor(self.values[name], dtype=scaled.dtype).view(-1, 1, 1)
            for name in ("image_mean", "image_std")
        )
        return (scaled - mean) / std


def _grids(most: int) -> list[tuple[int, int]]:
    """Return all grids of at most so many tiles, in the original's order: of equal ones, the first wins."""
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for count in range(most, 0, -1):
        for rows in range(1, count + 1):
            if count % rows == 0:
                columns = count // rows
                by_ratio.setdefault(rows / columns, []).append((rows, columns))
    return [grid for grids in by_ratio.values() for grid in grids]


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return bytes as torchvision does, which resizes bytes without making them floats."""
    if pixels.shape[-2:] == size:
        return pixels
    return interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
