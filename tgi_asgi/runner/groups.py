"""Groups layers that share block tables and counts the blocks that a sequence needs in each. Without torch.

Full-attention layers need all blocks of a sequence; sliding-window layers need only those within the window.
They therefore belong to different groups, each with its own block table. Layers of one kind are cut into
groups of equal size, so that all groups use blocks of one size from a single pool.

    Gemma 3 1B: 26 layers, every sixth with full attention
    groups     4 full-attention | 4, 4, 4, 4, 4 and 2 with a window of 512  two of 28 places have no layer
    16k tokens 1024 blocks      | 33 blocks each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MAX_PADDING = 0.1  # as a share of a token's bytes


@dataclass(frozen=True, slots=True)
class CacheGroups:
    """The layers of a model, grouped by which positions they read.

    Attributes:
        windows: Per group: number of positions a token attends to, itself included; None: all. Longest first.
        of_layers: Group index of each layer.
        bytes_per_token: Bytes of a token in the layers of the largest group.
    """

    windows: tuple[int | None, ...]
    of_layers: tuple[int, ...]
    bytes_per_token: int

    @classmethod
    def of(cls, windows: Sequence[int | None], sizes: Sequence[int]) -> CacheGroups:
        """Cut layers into the fewest groups that waste at most a tenth of a token's bytes.

        If there are no such groups, use those that waste the least.

        Args:
            windows: Window of each layer.
            sizes: Bytes per token in each layer.
        """
        if not windows:
            return cls((None,), (), 0)
        kinds: dict[int | None, list[int]] = {}
        for layer, window in enumerate(windows):
            kinds.setdefault(window, []).append(layer)
        ordered = sorted(kinds, key=lambda window: -(1 << 62) if window is None else -window)
        total = sum(sizes)
        prefixes = {
            sum(sizes[layer] for layer in kind[:count])
            for kind in kinds.values()
            for count in range(len(kind) + 1)
        }
        widest = max(sizes)
        cuts = [
            (size, [(window, part) for window in ordered for part in _cut(kinds[window], sizes, size)])
            for size in sorted({size for size in prefixes if size >= widest} | {widest}, reverse=True)
        ]
        padding = [size * len(cut) - total for size, cut in cuts]
        best = next((at for at, lost in enumerate(padding) if lost <= _MAX_PADDING * total), None)
        size, cut = cuts[padding.index(min(padding)) if best is None else best]
        of_layers = [0] * len(windows)
        for group, (_, part) in enumerate(cut):
            for layer in part:
                of_layers[layer] = group
        return cls(tuple(window for window, _ in cut), tuple(of_layers), size)


def _cut(layers: Sequence[int], sizes: Sequence[int], max_size: int) -> list[list[int]]:
    """Return the layers in parts whose sizes add up to at most `max_size`."""
    parts: list[list[int]] = []
    room = 0
    for layer in layers:
        if not parts or sizes[layer] > room:
            parts.append([])
            room = max_size
        parts[-1].append(layer)
        room -= sizes[layer]
    return parts


@dataclass(frozen=True, slots=True)
class BlockNeeds:
    """How many blocks of `block_size` tokens a sequence holds in each group.

    In a sliding-window group a prompt holds the blocks within the window plus those that the steps in flight
    fill, which have at most `max_step_tokens` tokens together. Later tokens reuse the blocks that the window
    has passed.
    """

    windows: tuple[int | None, ...]
    block_size: int
    max_step_tokens: int

    def first_read(self, group: int, position: int) -> int:
        """Return the index of the first block that a token at this position reads."""
        window = self.windows[group]
        return 0 if window is None else max(position - window + 1, 0) // self.block_size

    def max_held(self, group: int, num_tokens: int) -> int:
        """Return the most blocks that a sequence of `num_tokens` tokens holds at a time."""
        num_blocks = -(-num_tokens // self.block_size)
        window = self.windows[group]
        if window is None:
            return num_blocks
        reached, in_flight = -(-(window - 1) // self.block_size), -(-self.max_step_tokens // self.block_size)
        return min(num_blocks, reached + in_flight + 1)

    def total_for(self, num_tokens: int, *, keeps_all: bool = False) -> int:
        """Return the most blocks that a sequence of `num_tokens` tokens holds in all groups together.

        `keeps_all`: whether no block is freed before the whole prompt has been computed.
        """
        if keeps_all:
            return len(self.windows) * -(-num_tokens // self.block_size)
        return sum(self.max_held(group, num_tokens) for group in range(len(self.windows)))

    def longest_fitting(self, num_blocks: int, max_tokens: int) -> int:
        """Return the most tokens, up to `max_tokens`, of a sequence that holds `num_blocks` blocks."""
        low, high = 0, max_tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self.total_for(middle) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return low
