"""What image processors computed with torch have in common, which `transformers` has only for torchvision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor


class TorchImages:
    """What these processors have in common.

    Args:
        options: Contents of the checkpoint's preprocessor_config.json.

    Raises:
        ValueError: if they ask for something else than the class computes.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    # What every checkpoint has, and the class does not compute otherwise.
    fixed: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, options: Mapping[str, Any]) -> None:
        for name, only in {"do_resize": True, "do_rescale": True, **self.fixed}.items():
            if (given := options.get(name, only)) != only:
                raise ValueError(f"{name} must be {only}, got {str(given)[:100]}")
        self.values = {
            name: options.get(name, default)
            for name, default in {"rescale_factor": 1 / 255, **self.defaults}.items()
        }

    def fetch_images(self, images: Any) -> Any:
        """Return the images unchanged: none needs to be fetched from the network."""
        return images

    def _scaled(self, pixels: Tensor) -> Tensor:
        scaled: Tensor = pixels * self.values["rescale_factor"]
        return scaled


def flat(images: Sequence[Any]) -> list[Any]:
    """Return images that may be grouped by prompt."""
    return [each for part in images for each in (part if isinstance(part, (list, tuple)) else [part])]


def pixels_of(image: Any) -> Tensor:
    """Return an image's bytes [1, 3, height, width]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
