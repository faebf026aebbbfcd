"""That the benchmarks measure what they say: memory in huge pages, and steps of sampled tokens."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.bandwidth import MIB, memory_in_huge_pages
from bench.engine import Engine, Sequence


def test_the_bandwidth_is_that_of_huge_pages_if_the_system_gives_any() -> None:
    values = memory_in_huge_pages(4 * MIB)
    mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    (mapping,) = [text for text in mappings if _holds(text, values.ctypes.data)]
    [flags] = re.findall(r"^VmFlags: (.*)$", mapping, re.MULTILINE)
    assert "hg" in flags.split() and "sh" not in flags.split()


def _holds(mapping: str, address: int) -> bool:
    bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", mapping)
    return bounds is not None and int(bounds[1], 16) <= address < int(bounds[2], 16)


def test_decoded_tokens_are_not_computed_as_a_prompt_s() -> None:
    model: Any = SimpleNamespace(runner=None, info=SimpleNamespace(vocab_size=9))
    sequence = Sequence(0, [1, 2], [[0]], num_computed=2)
    (row,) = Engine(model).decode_rows([sequence])
    assert (row.start, row.is_generated, sequence.num_computed) == (2, True, 3)
