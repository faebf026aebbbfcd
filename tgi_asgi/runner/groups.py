"""Which layers share block tables, and how many blocks a sequence needs of each. Without torch.

Layers that see all positions need all blocks of a sequence, layers with a window only those that it reaches
into: they are of different groups, each with a block table of its own. All groups have blocks of one size, so
that one pool serves them: layers of a kind are cut into groups of the same number.

    Gemma 3 1B: 26 layers, of which each sixth sees all positions
    groups     4 of these | 4, 4, 4, 4, 4 and 2 with a window of 512       two of 28 places have no layer
    16k tokens 1024 blocks | 33 blocks each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MOST_PADDING = 0.1  # of the bytes of a token


@dataclass(frozen=True, slots=True)
class CacheGroups:
    """The layers of a model, by what they need of a sequence.

    Attributes:
        windows: of each group: how many positions a token sees, its own the last; None: all. The longest
            first.
        of_layers: the group of each layer.
        bytes_per_token: in the layers of a group, that of the most.
    """

    windows: tuple[int | None, ...]
    of_layers: tuple[int, ...]
    bytes_per_token: int

    @classmethod
    def of(cls, windows: Sequence[int | None], sizes: Sequence[int]) -> CacheGroups:
        """Cut layers into groups: as few as leave hardly a place of a block empty.

        Args:
            windows: of each layer.
            sizes: the bytes that a token takes in it.
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
        best = next((at for at, lost in enumerate(padding) if lost <= _MOST_PADDING * total), None)
        size, cut = cuts[padding.index(min(padding)) if best is None else best]
        of_layers = [0] * len(windows)
        for group, (_, part) in enumerate(cut):
            for layer in part:
                of_layers[layer] = group
        return cls(tuple(window for window, _ in cut), tuple(of_layers), size)


def _cut(layers: Sequence[int], sizes: Sequence[int], most: int) -> list[list[int]]:
    """Return layers in parts whose sizes are no more than this together."""
    parts: list[list[int]] = []
    room = 0
    for layer in layers:
        if not parts or sizes[layer] > room:
            parts.append([])
            room = most
        parts[-1].append(layer)
        room -= sizes[layer]
    return parts


@dataclass(frozen=True, slots=True)
class BlockNeeds:
    """How many blocks of `block_size` tokens a sequence holds in each group.

    Of a window's group a prompt holds those that the window reaches into and those that the steps in flight
    fill, `max_step_tokens` together: what comes behind takes the place of what the window has left.
    """

    windows: tuple[int | None, ...]
    block_size: int
    max_step_tokens: int

    def first_read(self, group: int, position: int) -> int:
        """Return the first block that a token at this position reads."""
        window = self.windows[group]
        return 0 if window is None else max(position - window + 1, 0) // self.block_size

    def most_held(self, group: int, num_tokens: int) -> int:
        """Return how many blocks a sequence of so many tokens holds at a time at the most."""
        num_blocks = -(-num_tokens // self.block_size)
        window = self.windows[group]
        if window is None:
            return num_blocks
        reached, in_flight = -(-(window - 1) // self.block_size), -(-self.max_step_tokens // self.block_size)
        return min(num_blocks, reached + in_flight + 1)

    def of_tokens(self, num_tokens: int, *, keeps_all: bool = False) -> int:
        """Return how many blocks a sequence of so many tokens holds in all groups at the most.

        `keeps_all`: nothing is given back before its prompt has been computed.
        """
        if keeps_all:
            return len(self.windows) * -(-num_tokens // self.block_size)
        return sum(self.most_held(group, num_tokens) for group in range(len(self.windows)))

    def longest(self, num_blocks: int, most: int) -> int:
        """Return how many tokens, up to `most`, a sequence can have that holds at most so many blocks."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.of_tokens(middle) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return low
