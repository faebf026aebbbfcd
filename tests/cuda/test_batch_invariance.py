"""--batch-invariant on emulated kernels: a sequence's logits have the same bits alone and in a batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import FP16, PROMPT
from tests.emulation import bindings, library
from tests.support.checkpoints import load_model, make_model, save, save_gguf
from tests.support.runner_driver import Job, generate
from tgi_asgi.models.pooling import PoolingFiles
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.runner import cuda_load
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

pytestmark = pytest.mark.thorough

SAMPLING = SamplingParams(temperature=0.0, logprobs=5)


def make_runner(directory: Path, kind: str) -> CudaRunner:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "experts" else {}
    reference = make_model(
        "Mixtral" if experts else "Llama", hidden_size=128, intermediate_size=128, num_attention_heads=2,
        num_key_value_heads=1, num_hidden_layers=2, tie_word_embeddings=True, **experts,
    )  # fmt: skip
    is_plain = kind != "Q4_1"
    files = (
        save(reference, directory, FP16) if is_plain else save_gguf(reference, directory / "tiny.gguf", kind)
    )
    model = load_model(files, Repacking(FP16), max_positions=256)
    settings = Settings(batch_invariant=True, max_batch_size=4, max_batch_prefill_tokens=60)
    runner = cuda_load.make_runner(
        model, settings, EmulatedDevice(), cuda_load.spec_of(settings, FP16, 256), PoolingFiles()
    )
    return runner


@pytest.mark.parametrize("kind", ["F16", "Q4_1", "experts"])
async def test_logits_have_the_same_bits_alone_among_others_and_in_chunks(tmp_path: Path, kind: str) -> None:
    library.require()
    bindings.install()
    runner = make_runner(tmp_path, kind)
    try:
        alone, cut, among = (Job(PROMPT, 5, SAMPLING) for _ in range(3))
        await generate(runner, [alone])
        await generate(runner, [cut], chunk=len(PROMPT) - 1)  # the last token in its own step
        others = [Job(PROMPT[3:] * 2, 6, SAMPLING), Job([7, 8], 9, SAMPLING), Job([4], 3, SAMPLING)]
        await generate(runner, [others[0], among, *others[1:]], chunk=52)
    finally:
        runner.close()
    assert all(sampled.top is not None and len(sampled.top) == 5 for sampled in alone.sampled)
    assert cut.sampled == alone.sampled
    assert among.sampled == alone.sampled
