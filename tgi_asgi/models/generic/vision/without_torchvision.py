"""Pillow and torch equivalents of parts of `transformers` that need torchvision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad


class PixtralImages:
    """The image half of `PixtralProcessor`, whose module needs torchvision.

    An image becomes rows of tokens. A break token follows each row except the last; an end token follows the
    last.
    """

    def __init__(
        self, image_processor: Any, tokenizer: Any, *, patch_size: int = 16, spatial_merge_size: int = 1,
        image_token: str = "[IMG]", image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
    ) -> None:  # fmt: skip
        self.image_processor, self.tokenizer, self.image_token = image_processor, tokenizer, image_token
        self._side = patch_size * spatial_merge_size
        self._merges = spatial_merge_size > 1
        self._row_end, self._end = image_break_token, image_end_token

    def _merge_kwargs(self, **_: Any) -> dict[str, dict[str, Any]]:
        return {"images_kwargs": {"patch_size": self._side}}

    def _process_images(self, images: Sequence[Any], **options: Any) -> tuple[Any, list[str]]:
        found = self.image_processor(images, **options)
        return found, [self._text(*map(int, size)) for size in found["image_sizes"]]

    def _text(self, height: int, width: int) -> str:
        # Mistral 3, which merges patches, drops a dimension then; Pixtral, which does not, has no such fault.
        if self._merges and height * width <= self._side**2:
            raise ValueError("it is too small: the model's code fails where an image is one token")
        row = self.image_token * (width // self._side)
        return self._row_end.join([row] * (height // self._side)) + self._end


_LFM2 = {
    "downsample_factor": 2,
    "do_image_splitting": True,
    "min_tiles": 2,
    "max_tiles": 10,
    "use_thumbnail": True,
    "min_image_tokens": 64,
    "max_image_tokens": 256,
    "encoder_patch_size": 16,
    "tile_size": 512,
    "max_pixels_tolerance": 2.0,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
# What every LFM2-VL has, and the class below does not compute otherwise: 2 is bilinear.
_LFM2_FIXED = {"do_rescale": True, "do_normalize": True, "do_pad": True, "resample": 2}


class Lfm2Images:
    """`Lfm2VlImageProcessor`: an image of any size as patches, a large one as tiles and a thumbnail.

    Args:
        options: Contents of the checkpoint's preprocessor_config.json.

    Raises:
        ValueError: if they ask for something else than this class computes.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        for name, only in _LFM2_FIXED.items():
            if (given := options.get(name, only)) != only:
                raise ValueError(f"{name} must be {only}, got {str(given)[:100]}")
        values = {name: options.get(name, default) for name, default in _LFM2.items()}
        self._values = values
        self.tile_size: int = values["tile_size"]
        self.encoder_patch_size: int = values["encoder_patch_size"]
        self.downsample_factor: int = values["downsample_factor"]
        self.use_thumbnail: bool = values["use_thumbnail"]
        self._min_tokens, self._max_tokens = values["min_image_tokens"], values["max_image_tokens"]
        self._has_tiles = values["do_image_splitting"] and values["max_tiles"] > 1
        self._token_side = self.encoder_patch_size * self.downsample_factor
        tile_patches = (self.tile_size // self.encoder_patch_size) ** 2 if values["do_image_splitting"] else 0
        self._num_patches = max(self._max_tokens * self.downsample_factor**2, tile_patches)

    def fetch_images(self, images: Any) -> Any:
        """Return the images unchanged: none needs to be fetched from the network."""
        return images

    def __call__(self, images: Sequence[Any], **_: Any) -> dict[str, Any]:
        """Return patches [tiles, patches, values] of all images, masks of the valid ones, and their grids."""
        patches, masks, shapes = [], [], []
        layout: dict[str, list[Any]] = {"image_rows": [], "image_cols": [], "image_sizes": []}
        for image in images:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
            tiles, rows, columns, size = self._tiles(pixels)
            for tile in tiles:
                made, mask, shape = self._patches(tile)
                patches.append(made)
                masks.append(mask)
                shapes.append(shape)
            for name, value in zip(layout, (rows, columns, size), strict=True):
                layout[name].append(value)
        return {
            "pixel_values": torch.stack(patches),
            "pixel_attention_mask": torch.stack(masks),
            "spatial_shapes": torch.tensor(shapes),
            **layout,
        }

    def _tiles(self, pixels: Tensor) -> tuple[list[Tensor], int, int, tuple[int, int]]:
        """Return the tiles of an image, their rows and columns, and the size of the whole image."""
        height, width = pixels.shape[-2:]
        size = self._fitting(height, width)
        if not (self._has_tiles and self._is_large(height, width)):
            return [self._whole(pixels, size)], 1, 1, size
        columns, rows = self._grid(height, width)
        side = self.tile_size
        whole = _resized(pixels, (side * rows, side * columns))
        tiles = [
            whole[..., row * side : (row + 1) * side, column * side : (column + 1) * side]
            for row in range(rows)
            for column in range(columns)
        ]
        if self.use_thumbnail and rows * columns > 1:
            tiles.append(self._whole(pixels, size))
        return tiles, rows, columns, size

    def _whole(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Return an image in this size, unless that has more patches than the tower accepts.

        A strip is at least as wide as a token, whatever that makes of its length.
        """
        if math.prod(size) > self._num_patches * self.encoder_patch_size**2:
            raise ValueError("it is too long and narrow")
        return _resized(pixels, size)

    def _is_large(self, height: int, width: int) -> bool:
        side = self._token_side
        area = math.prod(max(self.encoder_patch_size, round(each / side) * side) for each in (height, width))
        return bool(area > self._max_tokens * side**2 * self._values["max_pixels_tolerance"])

    def _fitting(self, height: int, width: int) -> tuple[int, int]:
        """Return the size to which an untiled image is resized: whole tokens, within the allowed number."""
        side = self._token_side
        min_area, max_area = self._min_tokens * side**2, self._max_tokens * side**2
        high, wide = (max(side, round(each / side) * side) for each in (height, width))
        if high * wide > max_area:
            factor = math.sqrt(height * width / max_area)
            high, wide = (max(side, math.floor(each / factor / side) * side) for each in (height, width))
        elif high * wide < min_area:
            factor = math.sqrt(min_area / (height * width))
            high, wide = (math.ceil(each * factor / side) * side for each in (height, width))
        return high, wide

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the columns and rows of the tile grid whose proportions are closest to the image's."""
        best, smallest = (1, 1), math.inf
        for columns, rows in self._grids():
            difference = abs(width / height - columns / rows)
            fills = height * width > 0.5 * self.tile_size**2 * columns * rows
            if difference < smallest or (difference == smallest and fills):
                best, smallest = (columns, rows), difference
        return best

    def _grids(self) -> list[tuple[int, int]]:
        low, high = self._values["min_tiles"], self._values["max_tiles"]
        sides = range(1, high + 1)
        # Among grids of equal area the first wins, so the set's iteration order must be the original's.
        found = {
            (w, h) for n in sides for w in sides[:n] for h in sides[:n] if low <= w * h <= high and n >= low
        }
        return sorted(found, key=lambda grid: grid[0] * grid[1])

    def _patches(self, tile: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Return a tile's padded patches, a mask of the valid ones, and their rows and columns."""
        values, side = self._values, self.encoder_patch_size
        mean, std = (torch.tensor(values[name]).view(-1, 1, 1) for name in ("image_mean", "image_std"))
        normal = (tile[0] * values["rescale_factor"] - mean) / std
        rows, columns = normal.shape[1] // side, normal.shape[2] // side
        cut = normal.reshape(3, rows, side, columns, side).permute(1, 3, 2, 4, 0)
        patches = cut.reshape(rows * columns, -1)
        mask = torch.zeros(self._num_patches, dtype=torch.int32)
        mask[: len(patches)] = 1
        return pad(patches, (0, 0, 0, self._num_patches - len(patches))), mask, (rows, columns)


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return bytes as torchvision does, which resizes bytes without making them floats."""
    return interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
