"""All logits of given tokens (teacher forcing), from the kernels and the step that the server runs.

    teacher = Teacher(files, dtype="auto", max_tokens=2048)
    logits = teacher.logits(ids)  # [len(ids), vocab] float32

The runner returns log-probabilities of only a few tokens; a KL divergence needs all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.family import record
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.runner.inputs import StepInputs
from tgi_asgi.runner.plan import StepRow

BLOCK_SIZE = 16
ROWS = 64  # of logits at a time


class Teacher:
    """A loaded model with one sequence, computed on the thread team.

    Args:
        dtype: "float32" for the exact arithmetic, "auto" for the fast one; as --dtype.
        kv_cache_dtype: "auto" or "int8"; as --kv-cache-dtype.
        prompt_precision: "int8" or "bfloat16"; as --prompt-precision. All tokens count as prompt tokens.
    """

    def __init__(
        self,
        files: ModelFiles,
        dtype: str,
        max_tokens: int,
        *,
        kv_cache_dtype: str = "auto",
        prompt_precision: str = "int8",
    ) -> None:
        is_exact = dtype == "float32"
        floats: ops.KvDtype = "float32" if is_exact else "bfloat16"
        ops.configure_threads()
        torch.set_num_threads(1)  # its threads would compete with the team
        packing = ops.Packing(is_exact=is_exact, has_float_prompts=prompt_precision == "bfloat16")
        with OpenModel(files) as opened:
            config = opened.config
            model = opened.load(packing, max_tokens)
        assert isinstance(config, ModelConfig) and model.kind == "native"
        num_blocks = -(-max_tokens // BLOCK_SIZE)
        pool = ops.KvPool(
            config.caches,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            dtype="int8" if kv_cache_dtype == "int8" else floats,
        )
        self._inputs = StepInputs(
            vocab_size=config.vocab_size,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_context=max_tokens,
            max_rows=ROWS,
            max_tokens=max_tokens,
        )
        limits = ops.StepLimits(max_tokens=max_tokens, max_sequences=1, max_rows=ROWS, max_context=max_tokens)
        self._program = ops.CpuProgram(record(model, pool.layers), limits)
        self._blocks = range(num_blocks)
        self._last_ids = np.zeros(ROWS, np.int32)

    def logits(self, ids: Sequence[int], start: int = 0) -> Tensor:
        """Return the logits [n, vocab] after each of `ids`, which follow `start` tokens computed before."""
        row = StepRow(0, ids, start, [self._blocks], samples=False)
        batch = self._inputs.fill([row], self._last_ids)
        self._program.run(batch, ())
        parts = (range(first, min(first + ROWS, len(ids))) for first in range(0, len(ids), ROWS))
        return torch.from_numpy(np.concatenate([self._program.run_head(part).copy() for part in parts]))

    def sample(self, prompt: Sequence[int], count: int, seed: int) -> list[int]:
        """Continue a prompt by `count` tokens sampled at temperature 1, past EOS too."""
        generator = torch.Generator().manual_seed(seed)
        found: list[int] = []
        last = self.logits(prompt)[-1]
        while len(found) < count:
            found.append(int(torch.multinomial(last.softmax(-1), 1, generator=generator)))
            last = self.logits(found[-1:], len(prompt) + len(found) - 1)[0]
        return found
