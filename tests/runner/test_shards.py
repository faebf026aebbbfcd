"""Several tensor-parallel shards produce the same text as a whole model; and how they end."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.checkpoints import make_model, save, save_tokenizer
from tests.support.families import CASES
from tests.support.family_case import FamilyCase
from tests.support.family_files import checkpoint
from tests.support.gguf_models import LLAMA, QWEN3_MOE, make
from tests.support.quantised import save_quantised
from tests.support.runner_driver import Job, compare, generate, sample_over_a_shared_block
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.runner.plan import SlotStart, StepPlan, StepRow
from tgi_asgi.runner.shard_program import CpuShardJob, load_program
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

SCORED = SamplingParams(temperature=0.0, logprobs=5)


@asynccontextmanager
async def serving(files: ModelFiles, num_shard: int, **changes: Any) -> AsyncIterator[LoadedModel]:
    """Load a model in `num_shard` shards, by default in float32, and end them afterwards."""
    settings: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "thread_nice": 0, "max_batch_size": 4}
    chosen = Settings(num_shard=num_shard, max_total_tokens=256, **{**settings, **changes})
    loaded = load(chosen, files)
    try:
        yield loaded
    finally:
        loaded.runner.close()


async def scored(files: ModelFiles, num_shard: int, num_tokens: int = 8, **changes: Any) -> list[Job]:
    """Continue three prompts, one of them in chunks, and score the second; twice, with the same bits."""
    prompts = [[7, 11, 13, 17, 19] * 8, [3, 5, 2, 9, 40, 41, 42], [90]]
    first, again = (
        [
            Job(prompt, num_tokens, SCORED, wants_prompt_logprobs=2 if index == 1 else None)
            for index, prompt in enumerate(prompts)
        ]
        for _ in range(2)
    )
    async with serving(files, num_shard, **changes) as loaded:
        await generate(loaded.runner, first, chunk=30)
        await generate(loaded.runner, again, chunk=30)
    assert [job.sampled for job in again] == [job.sampled for job in first], "bits must not depend on time"
    return first


@pytest.mark.thorough
async def test_two_shards_of_the_demonstration_model_write_what_one_does(demo_files: ModelFiles) -> None:
    """Use a model whose 9 heads split into 6 and 3, and whose 3 KV heads split into 2 and 1."""
    compare(await scored(demo_files, 2), await scored(demo_files, 1))


async def test_two_shards_of_unequal_sizes_write_what_one_does(tmp_path: Path) -> None:
    """Use 9 heads and 3 KV heads, as the demonstration model has, and an MLP of 24 strips."""
    shape = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 384}
    files = save(make_model(**shape), tmp_path)
    save_tokenizer(tmp_path)
    compare(await scored(files, 2), await scored(files, 1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Save a model with 4 heads, 2 KV heads, and an MLP of 96 columns, 24 per shard: no whole strips."""
    directory = tmp_path_factory.mktemp("model")
    files = save(make_model(), directory)
    save_tokenizer(directory)
    return files


async def test_more_shards_than_kv_heads_write_what_one_does(tiny: ModelFiles) -> None:
    compare(await scored(tiny, 4), await scored(tiny, 1))


# Cases with recurrent layers, norms over all heads, or layers of several shapes.
REFUSED = re.compile(r"lfm[23]|hybrid|qwen3_(next|5)|falcon_h1|mamba|jamba|bamba|nemotron_h|gemma4|olmo[23e]")


@pytest.mark.models
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
async def test_two_shards_of_every_family_write_what_one_does_or_it_is_refused(case: FamilyCase) -> None:
    files = checkpoint(case)
    if REFUSED.search(case.name):
        with pytest.raises(ModelLoadError, match=f"^--num-shard 2: {case.served_as} has "):
            await scored(files, 2)
        return
    compare(await scored(files, 2), await scored(files, 1))


def _case(**changes: Any) -> FamilyCase:
    return FamilyCase("llama", "LlamaForCausalLM", {**LLAMA.config, **changes}, ())


def _experts(**changes: Any) -> FamilyCase:
    return replace(QWEN3_MOE, config={**QWEN3_MOE.config, **changes})


QUANTISED = [
    # A block has 256 columns: those of four heads, which share a KV head, or a third of the MLP's.
    pytest.param(
        "Q4_K",
        _case(hidden_size=512, num_attention_heads=8, num_key_value_heads=2, intermediate_size=768),
        id="Q4_K",
    ),
    pytest.param(
        "Q8_0",
        _case(hidden_size=192, num_attention_heads=6, num_key_value_heads=3),
        id="Q8_0",
        marks=pytest.mark.models,
    ),
    # Three blocks of each expert: two for the first shard, one for the second.
    pytest.param(
        "Q4_K",
        _experts(num_attention_heads=8, num_key_value_heads=2, moe_intermediate_size=768),
        id="experts-Q4_K",
    ),
    pytest.param(
        "MXFP4",
        _experts(num_key_value_heads=2, moe_intermediate_size=96),
        id="experts-MXFP4",
        marks=pytest.mark.models,
    ),
]


@pytest.mark.parametrize(("format", "case"), QUANTISED)
async def test_shards_of_quantised_weights_write_what_one_does(
    format: str, case: FamilyCase, tmp_path: Path
) -> None:
    made = make(case, tmp_path, {"*embed*": "Q8_0", "*lm_head*": "Q8_0", "*": format})
    compare(await scored(made.files, 2), await scored(made.files, 1))


async def test_shards_of_weights_in_act_order_write_what_one_does(tmp_path: Path) -> None:
    """Rows of codes keep their order of columns; columns, which have parts of all groups, are decoded."""
    model = make_model(hidden_size=256, intermediate_size=512)
    files = save_quantised(model, tmp_path, "gptq", has_order=True)
    save_tokenizer(tmp_path)
    compare(await scored(files, 2), await scored(files, 1), tolerance=0.03)  # columns became float16


def test_a_shard_joins_the_group_while_it_may_use_the_cores_of_all_shards() -> None:
    """On its own cores alone, a group of as many threads as cores would seem to have too many."""

    class JoinedError(Exception):
        """Raised where the shard maps the group's memory, with the cores that it may then use."""

    def join(descriptor: int, rank: int) -> None:
        raise JoinedError(os.sched_getaffinity(0))

    cores = os.sched_getaffinity(0)
    cut, memory = SimpleNamespace(rank=1, count=2), SimpleNamespace(num_threads=1, open=join)
    job = SimpleNamespace(settings=Settings(), cut=cut, memory=memory, descriptor=-1)
    try:
        with pytest.raises(JoinedError) as joined:
            load_program(cast(CpuShardJob, job))
    finally:
        os.sched_setaffinity(0, cores)
    assert joined.value.args == (cores,)


async def test_blocks_are_copied_and_shared_in_all_shards(tiny: ModelFiles) -> None:
    prompt = [(7 * at) % 150 + 2 for at in range(24)]
    async with serving(tiny, 2) as loaded:
        steps = await sample_over_a_shared_block(loaded.runner, prompt, SCORED)
        assert all(first == second for first, second in steps)
        copied = await loaded.runner.submit(StepPlan(9, [], copies=[(5, 20), (9, 21)]))
        assert copied.sampled == []
        # Compute the last prompt token again, from the copies.
        row = StepRow(2, prompt[-1:], 23, [[20, 21]], samples=True)
        again = await loaded.runner.submit(StepPlan(10, [row], [SlotStart(2, SCORED, 0, prompt)]))
        assert again.sampled[0] == steps[0][0]


async def test_a_shard_that_dies_is_told_and_fails_the_step(tiny: ModelFiles) -> None:
    async with serving(tiny, 2) as loaded:
        assert loaded.shards is not None
        reported: list[str] = []
        loaded.shards.others.watch(reported.append)
        (process,) = loaded.shards.others.processes
        process.kill()
        process.wait()
        jobs = [Job([1, 2, 3], 200, SCORED)]
        with pytest.raises(RuntimeError, match="another shard of the model has ended"):
            await generate(loaded.runner, jobs)
        assert reported == ["shard 1 of the model has ended"]


async def test_shards_end_with_their_runner(tiny: ModelFiles) -> None:
    async with serving(tiny, 2) as loaded:
        assert loaded.shards is not None
        processes = list(loaded.shards.others.processes)
        for number in (signal.SIGINT, signal.SIGTERM):  # shards ignore both, as shard 0 needs them to drain
            os.kill(processes[0].pid, number)
        await generate(loaded.runner, [Job([1, 2, 3], 4, SCORED)])
    assert [process.returncode for process in processes] == [0]  # each exits by itself


def test_what_several_shards_do_not_compute_is_refused_by_name(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    refused: dict[tuple[str, str], dict[str, Any]] = {
        ("Lfm2", "recurrent layers"): {"layer_types": ["conv", "conv", "full_attention"]},
        ("Olmo2", "norms over all heads"): {"num_key_value_heads": 4},
    }
    for (kind, named), changes in refused.items():
        files = save(make_model(kind, **changes), tmp_path)
        with pytest.raises(ModelLoadError, match=f"--num-shard 2: {kind}ForCausalLM has {named}"):
            load(Settings(num_shard=2), files)


def test_too_many_shards_and_the_code_of_transformers_are_refused(tiny: ModelFiles) -> None:
    for settings, message in (
        (Settings(num_shard=5), "2 query heads of each KV head are too few for 3 shards"),
        (
            Settings(num_shard=2, model_impl="transformers"),
            "computed by transformers' code, which is not split",
        ),
    ):
        with pytest.raises(ModelLoadError, match=message):
            load(settings, tiny)


def test_a_shard_that_cannot_load_ends_the_start_with_its_reason(
    tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TGI_ISA", "none such")  # only for the shards; this process has its kernels already
    with pytest.raises(ModelLoadError, match="shard 1 of the model has ended"):
        load(Settings(num_shard=2, dtype="float32"), tiny)
