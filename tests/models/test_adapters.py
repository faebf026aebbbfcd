"""LoRA adapters against `peft` in float32: on the families, alone and in mixed batches."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support import architectures
from tests.support.adapters import ALL_PRODUCTS, make_adapter, peft_logprobs, write_adapter
from tests.support.checkpoints import make_model, save, save_tokenizer
from tests.support.families import CASES
from tests.support.family_case import FamilyCase
from tests.support.family_files import Reference, checkpoint, gguf_file, reference
from tests.support.family_scores import differences
from tests.support.family_states import STATE_CASES
from tests.support.quantised import save_quantised
from tests.support.runner_driver import Job, generate
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

EXACT = 5e-5  # of a log-probability
MIN_EFFECT = 0.1  # least effect of each adapter on a log-probability
NUM_BEST = 5
BY_NAME = {case.name: case for case in CASES}
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def load_case(files: ModelFiles, **settings: Any) -> LoadedModel:
    given: dict[str, Any] = {
        "dtype": "float32", "num_threads": 2, "thread_nice": 0, "max_batch_size": 6, "enable_lora": True,
        "max_batch_prefill_tokens": 128, "max_batch_total_tokens": 1024,
    }  # fmt: skip
    return load(Settings(**given | settings), files)


@pytest.fixture(scope="module")
def llama() -> Iterator[LoadedModel]:
    loaded = load_case(checkpoint(BY_NAME["llama"]))
    yield loaded
    loaded.runner.close()


def run(loaded: LoadedModel, jobs: list[Job], chunk: int = 24) -> None:
    asyncio.run(generate(loaded.runner, jobs, chunk=chunk))


def job_of(found: Reference, weights: Any) -> Job:
    sampling = SamplingParams(temperature=0.0, logprobs=NUM_BEST)
    return Job(found.prompt_ids, 6, sampling, wants_prompt_logprobs=NUM_BEST, adapter=weights)


def assert_matches_peft(job: Job, base: Path, adapter: Path | None, limit: float = EXACT) -> None:
    """Compare a job's log-probabilities with peft's for the tokens that it generated."""
    ids = [*job.prompt_ids, *job.token_ids]
    truth = Reference(list(job.prompt_ids), job.token_ids, peft_logprobs(base, adapter, ids))
    assert differences(job, truth).max() <= limit


def of(*target_modules: str, **more: Any) -> dict[str, Any]:
    return {"target_modules": list(target_modules), **more}


LATENT = of("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
OF_INPUTS = ("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection")
NEOX = of("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
more_families = functools.partial(pytest.param, marks=pytest.mark.models)


@pytest.mark.parametrize(("name", "changes"), [("llama", {"r": 16}), ("phi3", of(*FUSED)), ("granite", {})])
def test_adapters_in_float32_keep_its_precision(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    case = BY_NAME[name]
    files, found = checkpoint(case), reference(case)
    adapter = make_adapter(files.path, tmp_path, seed=1, is_rounded=False, **changes)
    loaded = load_case(files, max_lora_rank=16)
    try:
        assert loaded.adapters is not None
        job = job_of(found, loaded.adapters.load(adapter).weights)
        run(loaded, [job])
    finally:
        loaded.runner.close()
    assert_matches_peft(job, files.path, adapter)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-biases", {}),
        ("llama-head-24", {"target_modules": ["q_proj", "v_proj"], "r": 3}),
        ("llama-odd-sizes", {"r": 5, "use_rslora": True}),
        ("qwen2-unused-window", {"layers_to_transform": [0, 2]}),
        ("qwen3", {"rank_pattern": {"k_proj": 2, "1.mlp.down_proj": 7}, "alpha_pattern": {"o_proj": 3}}),
        ("granite", {}),
        ("smollm3-other-layers", {"target_modules": ["o_proj", "down_proj"], "r": 33}),
        ("phi3-old-config", {"target_modules": FUSED}),
        more_families("olmo2", {}),
        ("mistral-window", {"target_modules": ["gate_proj", "k_proj"]}),
        ("gpt2", of("c_attn", "c_proj", "c_fc", fan_in_fan_out=True)),
        ("gpt_neox", NEOX),
        more_families("gpt_neox-sequential", {**NEOX, "r": 9}),
        more_families("gpt2-scales", of("c_attn", fan_in_fan_out=True)),
        more_families("seed_oss-biases", {}),
        more_families("ernie4_5", {}),
        more_families("starcoder2", of("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj")),
        more_families("stablelm-parallel", {}),
        more_families("phi", of("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
        more_families("falcon", {**NEOX, "r": 3}),
        more_families("falcon-new", NEOX),
        more_families("bloom", NEOX),
        more_families("minicpm3", LATENT),
        more_families("deepseek_v3-halves", of("q_proj", "kv_a_proj_with_mqa", "o_proj")),
        more_families("falcon_h1", of("q_proj", "k_proj", "o_proj", "in_proj", "gate_proj", "down_proj")),
        more_families("granite_hybrid-dense", of("o_proj", "in_proj", "input_linear", "output_linear")),
        more_families("mpt", of("Wqkv", "out_proj", "up_proj", "down_proj")),
        more_families("gemma4-shared", of("q_proj", "v_proj", "down_proj", *OF_INPUTS)),
        more_families("gemma4-experts", of("q_proj", "k_proj", "o_proj", "up_proj")),
        more_families("lfm3", of("q_proj", "k_proj", "g_proj", "in_proj", "w1", "w2")),
        more_families("bamba", of("v_proj", "in_proj", "gate_proj")),
        more_families("nemotron_h", of("q_proj", "v_proj", "in_proj", "up_proj", "down_proj")),
        more_families("mamba2", of("in_proj")),
        more_families("qwen3_next", of("q_proj", "in_proj_qkvz", "in_proj_ba")),
        more_families("qwen3_5", of("q_proj", "v_proj", "in_proj_qkv", "in_proj_z", "up_proj")),
        more_families("jamba", of("q_proj", "o_proj", "in_proj", "x_proj", "down_proj")),
    ],
)
def test_a_family_gives_what_peft_gives_alone_and_among_others(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    case = BY_NAME[name]
    files, found = checkpoint(case), reference(case)
    adapters = [make_adapter(files.path, tmp_path / f"{seed}", seed=seed, **changes) for seed in (1, 2)]
    loaded = load_case(files)
    try:
        assert loaded.adapters is not None
        weights = [loaded.adapters.load(adapter).weights for adapter in adapters]
        alone = [job_of(found, each) for each in (None, *weights)]
        for job in alone:
            run(loaded, [job])
        order = (0, 1, 0, 2, 1)
        mixed = [job_of(found, (None, *weights)[which]) for which in order]
        run(loaded, mixed, chunk=31)
    finally:
        loaded.runner.close()
    limit = 4 * EXACT if case in STATE_CASES else EXACT  # recurrences add up rounding
    base, *changed = alone
    assert differences(base, replace(found, token_ids=found.token_ids[: base.num_tokens])).max() <= limit
    for job, adapter in zip(changed, adapters, strict=True):
        assert_matches_peft(job, files.path, adapter, limit)
    for job, which in zip(mixed, order, strict=True):
        assert job.sampled == alone[which].sampled, "others in the batch must not change a bit"
        assert job.prompt_logprobs == alone[which].prompt_logprobs
    logprobs = [np.array([value for value, _ in job.prompt_logprobs[1:]], float) for job in alone]
    for one in range(3):
        for other in range(one):
            assert np.abs(logprobs[one] - logprobs[other]).max() > MIN_EFFECT


def bare(case: FamilyCase) -> list[Any]:
    """Return the results of a server without adapters."""
    loaded = load_case(checkpoint(case), enable_lora=False)
    job = job_of(reference(case), None)
    try:
        assert loaded.adapters is None
        run(loaded, [job])
    finally:
        loaded.runner.close()
    return [job.sampled, job.prompt_logprobs]


def test_rows_without_an_adapter_have_the_bits_that_they_have_without_the_feature(tmp_path: Path) -> None:
    case = BY_NAME["llama-biases"]
    found = reference(case)
    adapter = make_adapter(checkpoint(case).path, tmp_path / "a", seed=1)
    loaded = load_case(checkpoint(case))
    try:
        assert loaded.adapters is not None
        weights = loaded.adapters.load(adapter).weights
        jobs = [job_of(found, weights), job_of(found, None), job_of(found, weights)]
        run(loaded, jobs)
    finally:
        loaded.runner.close()
    assert [jobs[1].sampled, jobs[1].prompt_logprobs] == bare(case)
    assert jobs[0].prompt_logprobs != jobs[1].prompt_logprobs


@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.usefixtures("llama_cpp")
def test_quantised_bases_take_adapters_in_every_arithmetic(kind: str, dtype: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if kind in case.gguf)
    base, found = checkpoint(case).path, reference(case)
    adapter = make_adapter(base, tmp_path / "a", seed=1)
    loaded = load_case(gguf_file(case, kind), dtype=dtype)
    try:
        assert loaded.adapters is not None
        jobs = [job_of(found, weights) for weights in (loaded.adapters.load(adapter).weights, None)]
        run(loaded, jobs)
    finally:
        loaded.runner.close()
    if dtype == "float32":
        assert_matches_peft(jobs[0], base, adapter)
    else:  # activations are rounded to eight bits
        ids = [*jobs[0].prompt_ids, *jobs[0].token_ids]
        truth = Reference(list(jobs[0].prompt_ids), jobs[0].token_ids, peft_logprobs(base, adapter, ids))
        assert differences(jobs[0], truth).mean() <= 0.08
        assert jobs[1].prompt_logprobs != jobs[0].prompt_logprobs


@pytest.mark.parametrize("has_order", [True, "each"], ids=["one order", "an order each"])
def test_matrices_in_act_order_take_adapters(has_order: bool | str, tmp_path: Path) -> None:
    model = make_model(hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1)
    files = save_quantised(model, tmp_path / "codes", "gptq", has_order=has_order)
    save_tokenizer(files.path)
    base = save(model, tmp_path / "values").path
    adapters = [make_adapter(base, tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    loaded = load_case(files)
    found = Reference(list(range(3, 40)), [], np.empty(0))
    try:
        assert loaded.adapters is not None
        jobs = [job_of(found, loaded.adapters.load(adapter).weights) for adapter in adapters]
        run(loaded, [*jobs, job_of(found, None)])
    finally:
        loaded.runner.close()
    for job, adapter in zip(jobs, adapters, strict=True):
        assert_matches_peft(job, base, adapter, limit=4 * EXACT)  # with weights four times as large


def test_rates_and_decays_of_qwen3_5_take_adapters_where_they_fill_panels(tmp_path: Path) -> None:
    """Whoever trains all linear layers trains these, too; published models have 16 to 64 value heads."""
    torch.manual_seed(0)
    sizes = {"linear_num_value_heads": 16, "linear_num_key_heads": 4}
    config: Any = architectures.config("qwen3_5_text", **sizes)
    model = transformers.Qwen3_5ForCausalLM(config).eval()
    files = save(model, tmp_path / "base")
    save_tokenizer(files.path)
    changes = of("in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "out_proj", *ALL_PRODUCTS)
    adapters = [make_adapter(files.path, tmp_path / f"{seed}", seed=seed, **changes) for seed in (1, 2)]
    loaded = load_case(files)
    found = Reference(list(range(3, 40)), [], np.empty(0))
    try:
        assert loaded.adapters is not None and loaded.info.implementation == "native"
        jobs = [job_of(found, loaded.adapters.load(adapter).weights) for adapter in adapters]
        run(loaded, [*jobs, job_of(found, None)])
    finally:
        loaded.runner.close()
    for job, adapter in zip(jobs, adapters, strict=True):
        assert_matches_peft(job, files.path, adapter, limit=4 * EXACT)  # recurrences add up rounding


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("shapes", "rank", "message"),
    [
        ({Q0: (128, 96)}, 4, r"lora_A.weight' has the shape \[4, 96\].*\[4, 128\].*another base"),
        ({Q0: (64, 128)}, 4, r"lora_B.weight' has the shape \[64, 4\].*\[128, 4\].*another base"),
        ({Q0: (128, 128)}, 65, r"has the rank 65; --max-lora-rank allows 64"),
        ({"base_model.model.model.layers.3.mlp.up_proj": (192, 128)}, 4, r"layers\.3.*no such product"),
        ({"base_model.model.lm_head": (320, 128)}, 4, "the head is not changed"),
        ({"base_model.model.model.embed_tokens": (320, 128)}, 4, "an embedding is not changed"),
        (
            {Q0: (128, 128), "base_model.model.model.layers.0.self_attn.qkv_proj": (256, 128)},
            4,
            "qkv_proj has rows that another target of the adapter has, too",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_tensors_name(
    shapes: dict[str, tuple[int, int]], rank: int, message: str, tmp_path: Path, llama: LoadedModel
) -> None:
    assert llama.adapters is not None
    with pytest.raises(ModelLoadError, match=message):
        llama.adapters.load(write_adapter(tmp_path / "a", shapes, rank))


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, llama: LoadedModel) -> None:
    folder = write_adapter(tmp_path / "a", {Q0: (128, 128)})
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors[f"{Q0}.lora_B.weight"][7, 1] = float("inf")
    (folder / "adapter_model.safetensors").unlink()
    save_file(tensors, folder / "adapter_model.safetensors")
    assert llama.adapters is not None
    with pytest.raises(ModelLoadError, match="q_proj has a value that is not finite"):
        llama.adapters.load(folder)


def test_another_models_adapter_is_no_row_of_this_one(tmp_path: Path, llama: LoadedModel) -> None:
    other = load_case(checkpoint(BY_NAME["qwen3"]))
    try:
        assert other.adapters is not None
        weights = other.adapters.load(write_adapter(tmp_path / "a", {Q0: (128, 128)})).weights
        with pytest.raises(ValueError, match="must be of this program's layout"):
            run(llama, [job_of(reference(BY_NAME["llama"]), weights)])
    finally:
        other.runner.close()


def test_a_sample_depends_on_its_own_adapter_alone(tmp_path: Path, llama: LoadedModel) -> None:
    """Check that a row's samples do not depend on other rows: sampled, with log-probabilities, in chunks."""
    found, base = reference(BY_NAME["llama"]), checkpoint(BY_NAME["llama"]).path
    assert llama.adapters is not None
    weights = [
        llama.adapters.load(make_adapter(base, tmp_path / f"{seed}", seed=seed, r=2 * seed)).weights
        for seed in (1, 2, 3)
    ]
    random = np.random.default_rng(5)
    jobs = []
    for index in range(18):
        which = [None, *weights][int(random.integers(4))]
        sampling = SamplingParams(
            temperature=float(random.choice([0.0, 0.8, 1.5])), top_k=int(random.choice([0, 5])),
            top_p=float(random.choice([1.0, 0.7])), seed=index, logprobs=3,
            repetition_penalty=float(random.choice([1.0, 1.3])),
        )  # fmt: skip
        prompt = found.prompt_ids[: int(random.integers(1, 40))]
        jobs.append(Job(prompt, int(random.integers(1, 9)), sampling, adapter=which))
    expected = []
    for job in jobs:
        run(llama, [job], chunk=200)
        expected.append(job.sampled)
    for turn, chunk in enumerate((5, 17, 64)):
        for first in range(0, len(jobs), 6):
            again = [
                Job(job.prompt_ids, job.num_tokens, job.sampling, adapter=job.adapter)
                for job in jobs[first : first + 6]
            ]
            run(llama, again[:: -1 if turn % 2 else 1], chunk=chunk)
            for job, wanted in zip(again, expected[first : first + 6], strict=True):
                assert job.sampled == wanted
