"""Equivalents, with bicubic resizing, of image processors that `transformers` has only for torchvision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from tgi_asgi.models.generic.vision.torch_images import TorchImages, flat, pixels_of

_BICUBIC = 3


class CohereImages(TorchImages):
    """`Cohere2VisionImageProcessor`: an image as tiles; if there are several, then also the whole of it."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"height": 512, "width": 512},
        "crop_to_patches": True,
        "max_patches": 12,
        "patch_size": 16,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    fixed: ClassVar[Mapping[str, Any]] = {"resample": _BICUBIC, "do_normalize": True}

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.patch_size: int = self.values["patch_size"]  # read by the processor
        size = self.values["size"]
        self._side = int(size["height"])
        if size["width"] != self._side:
            raise ValueError(f"size must be a square, got {str(size)[:100]}")

    def __call__(self, images: Sequence[Any], **_: Any) -> dict[str, Any]:
        """Return tiles [tiles, 3, side, side] of all images, and the number of each image's tiles."""
        found = [self._tiles(pixels_of(image)) for image in flat(images)]
        tiles = self._scaled(torch.cat(found))
        mean, std = (torch.tensor(self.values[name]).view(-1, 1, 1) for name in ("image_mean", "image_std"))
        return {"pixel_values": (tiles - mean) / std, "num_patches": [len(each) for each in found]}

    def _tiles(self, pixels: Tensor) -> Tensor:
        side = self._side
        columns, rows = self._grid(*pixels.shape[-2:]) if self.values["crop_to_patches"] else (1, 1)
        whole = _resized(pixels, (rows * side, columns * side))
        tiles = [
            whole[..., row * side : (row + 1) * side, column * side : (column + 1) * side]
            for row in range(rows)
            for column in range(columns)
        ]
        if len(tiles) > 1:
            tiles.append(_resized(pixels, (side, side)))
        return torch.cat(tiles)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the columns and rows of the grid that enlarges an image least, or else shrinks it least."""
        most = self.values["max_patches"]
        grids = [(w, h) for w in range(1, most + 1) for h in range(1, most + 1) if w * h <= most]
        grids.sort(key=lambda grid: grid[0] * grid[1])
        scales = [min(w * self._side / width, h * self._side / height) for w, h in grids]
        larger = [scale for scale in scales if scale >= 1]
        return grids[scales.index(min(larger) if larger else max(scales))]


class Gemma4UnifiedImages(TorchImages):
    """`Gemma4UnifiedImageProcessor`: an image of any proportions as up to `max_soft_tokens` large patches."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "patch_size": 16,
        "max_soft_tokens": 280,
        "pooling_kernel_size": 3,
    }
    fixed: ClassVar[Mapping[str, Any]] = {"resample": _BICUBIC, "do_normalize": False}

    def __call__(self, images: Sequence[Any], **_: Any) -> dict[str, Any]:
        """Return patches [images, tokens, values] of all images, padded, and their positions (x, y)."""
        patches, positions, counts = [], [], []
        for image in flat(images):
            made, places = self._patches(pixels_of(image))
            missing = self.values["max_soft_tokens"] - len(made)
            patches.append(pad(made, (0, 0, 0, missing)))
            positions.append(pad(places, (0, 0, 0, missing), value=-1))
            counts.append(len(made))
        return {
            "pixel_values": torch.stack(patches),
            "image_position_ids": torch.stack(positions),
            "num_soft_tokens_per_image": counts,
        }

    def _patches(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return an image's patches [n, values], values of a place side by side, and their positions."""
        side = self.values["patch_size"] * self.values["pooling_kernel_size"]
        rows, columns = self._fitting(*pixels.shape[-2:])
        size = (rows * side, columns * side)
        fitted = self._scaled(pixels if pixels.shape[-2:] == size else _resized(pixels, size))[0]
        cut = fitted.reshape(3, rows, side, columns, side).permute(1, 3, 2, 4, 0)
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        return cut.reshape(rows * columns, -1), torch.stack([column.flatten(), row.flatten()], dim=-1)

    def _fitting(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patches that keep an image's proportions.

        Raises:
            ValueError: if there would be none.
        """
        most, patch = self.values["max_soft_tokens"], self.values["patch_size"]
        kernel = self.values["pooling_kernel_size"]
        factor = math.sqrt(most * kernel**2 * patch**2 / (height * width))
        rows, columns = (math.floor(factor * each / (kernel * patch)) for each in (height, width))
        if rows == columns == 0:
            raise ValueError("it has no patch")
        if rows == 0:
            return 1, min(math.floor(width / height), most)
        if columns == 0:
            return min(math.floor(height / width), most), 1
        return rows, columns


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return bytes as torchvision does, which resizes bytes without making them floats."""
    return interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
