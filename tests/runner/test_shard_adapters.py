"""LoRA adapters in several shards compute what `peft` does, or one shard; loading, dropping, failing."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.adapters import make_adapter, peft_logprobs, write_adapter
from tests.support.checkpoints import make_model, save, save_tokenizer
from tests.support.families import CASES
from tests.support.family_case import FamilyCase
from tests.support.family_files import checkpoint
from tests.support.gguf_models import LLAMA, make
from tests.support.quantised import save_quantised
from tests.support.runner_driver import Job, compare, generate
from tgi_asgi import _C
from tgi_asgi.engine.adapters import Adapters, Lease
from tgi_asgi.errors import InvalidRequest, ModelLoadError
from tgi_asgi.formats.sources import AdapterSource, ModelFiles
from tgi_asgi.models.adapters import AdapterLoader, LoadedAdapter
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.runner.shard_adapters import OtherAdapters, SplitAdapterLoader, follow_adapters
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

SCORED = SamplingParams(temperature=0.0, logprobs=5)
PROMPTS = [[7, 11, 13, 17, 19] * 8, [3, 5, 2, 9, 40, 41, 42], [90, 4]]
TOLERANCE = 2e-3  # of a log-probability
BY_NAME = {case.name: case for case in CASES}
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
NEOX = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


@asynccontextmanager
async def serving(files: ModelFiles, num_shard: int, **changes: Any) -> AsyncIterator[LoadedModel]:
    """Load a model in `num_shard` shards, by default in float32, and end them afterwards."""
    settings: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "thread_nice": 0, "max_batch_size": 4}
    settings |= {"enable_lora": True, "max_total_tokens": 256, "num_shard": num_shard}
    loaded = load(Settings(**{**settings, **changes}), files)
    try:
        yield loaded
    finally:
        loaded.runner.close()


async def written(loaded: LoadedModel, weights: Sequence[Any]) -> list[Job]:
    """Continue a prompt per adapter (None: the base) in one batch, the first in chunks, the second scored."""
    jobs = [
        Job(prompt, 6, SCORED, wants_prompt_logprobs=2 if index == 1 else None, adapter=adapter)
        for index, (prompt, adapter) in enumerate(zip(PROMPTS, weights, strict=True))
    ]
    await generate(loaded.runner, jobs, chunk=30)
    return jobs


async def served(
    files: ModelFiles, num_shard: int, folders: Sequence[Path | None], **changes: Any
) -> list[Job]:
    """Continue a prompt per adapter in so many shards."""
    async with serving(files, num_shard, **changes) as loaded:
        return await written(loaded, [None if each is None else read(loaded, each) for each in folders])


def read(loaded: LoadedModel, folder: Path) -> Any:
    assert loaded.adapters is not None
    return loaded.adapters.load(folder).weights


def assert_follows(job: Job, base: Path, adapter: Path | None) -> None:
    """Compare the log-probabilities of sampled and of other likely tokens with peft's."""
    assert len(job.sampled) == job.num_tokens > 0
    rows = peft_logprobs(base, adapter, [*job.prompt_ids, *job.token_ids])[len(job.prompt_ids) - 1 : -1]
    for row, sampled in zip(rows, job.sampled, strict=True):
        assert sampled.token_id == row.argmax()
        for token, logprob in [(sampled.token_id, sampled.logprob), *(sampled.top or ())]:
            assert logprob == pytest.approx(float(row[token]), abs=TOLERANCE)


@dataclass(frozen=True)
class Base:
    """A model with two adapters of it."""

    files: ModelFiles
    one: Path
    two: Path

    @property
    def path(self) -> Path:
        return self.files.path


def make_base(directory: Path, **changes: Any) -> Base:
    files = save(make_model(**changes), directory / "base")
    save_tokenizer(files.path)
    one = make_adapter(files.path, directory / "one", seed=1, r=8, is_rounded=False)
    few = ["k_proj", "v_proj", "o_proj", "up_proj"]
    return Base(files, one, make_adapter(files.path, directory / "two", seed=2, r=3, target_modules=few))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Make a model of 6 heads and 3 KV heads: two shards have four and two, and two and one."""
    shape = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 160}
    return make_base(tmp_path_factory.mktemp("uneven"), **shape)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Make a model of 4 heads and 2 KV heads, which four shards repeat."""
    return make_base(tmp_path_factory.mktemp("tiny"))


async def test_two_shards_mix_adapters_and_the_base_in_one_step_as_peft_computes_them(uneven: Base) -> None:
    folders = [uneven.one, uneven.two, None]
    async with serving(uneven.files, 2) as loaded:
        jobs = await written(loaded, [None if each is None else read(loaded, each) for each in folders])
        plain = await written(loaded, [None] * 3)
    for job, folder in zip(jobs, folders, strict=True):
        assert_follows(job, uneven.path, folder)
    compare(jobs, await served(uneven.files, 1, folders))
    assert [job.sampled == other.sampled for job, other in zip(jobs, plain, strict=True)] == [
        False,
        False,
        True,
    ]


async def test_shards_that_repeat_kv_heads_repeat_their_rows_of_adapters(tiny: Base) -> None:
    folders = [tiny.two, None, tiny.one]
    for job, folder in zip(await served(tiny.files, 4, folders), folders, strict=True):
        assert_follows(job, tiny.path, folder)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("phi3", FUSED),  # one matrix of the adapter for q, k and v, and one for gate and up
        ("gpt_neox", NEOX),  # whose rows are in another order; an MLP without a gate
        # Beside experts, which no adapter changes.
        pytest.param("qwen2_moe", ["q_proj", "v_proj", "o_proj"], marks=pytest.mark.models),
        ("deepseek_v3", LATENT),
        pytest.param("deepseek_v2-lite", ["q_proj", "o_proj"], marks=pytest.mark.models),
        pytest.param("llama-biases", None, marks=pytest.mark.models),
        pytest.param("gpt2", ["c_attn", "c_proj", "c_fc"], marks=pytest.mark.models),
        pytest.param("gemma2", None, marks=pytest.mark.models),  # a norm before the residual
        pytest.param("granite", None, marks=pytest.mark.models),  # a factor before the residual
        pytest.param("stablelm-parallel", None, marks=pytest.mark.models),
        pytest.param("falcon-new", NEOX, marks=pytest.mark.models),
        pytest.param("bloom", NEOX, marks=pytest.mark.models),
        pytest.param("phi", ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"], marks=pytest.mark.models),
    ],
)
async def test_products_of_other_families_are_cut_as_their_weights(
    name: str, targets: list[str] | None, tmp_path: Path
) -> None:
    files = checkpoint(BY_NAME[name])
    changes: dict[str, Any] = {} if targets is None else {"target_modules": targets}
    changes |= {"fan_in_fan_out": True} if name == "gpt2" else {}
    adapter = make_adapter(files.path, tmp_path, seed=3, **changes)
    folders = [adapter, None, adapter]
    compare(await served(files, 2, folders), await served(files, 1, folders))


async def test_weights_in_act_order_take_adapters(tmp_path: Path) -> None:
    """Codes that are cut by rows keep their order of columns."""
    model = make_model(hidden_size=256, intermediate_size=512)
    save(model, tmp_path / "plain")
    codes = save_quantised(model, tmp_path / "codes", "gptq", has_order=True)
    save_tokenizer(tmp_path / "codes")
    adapter = make_adapter(tmp_path / "plain", tmp_path / "wide", seed=5)
    folders = [adapter, None, adapter]
    found, expected = await served(codes, 2, folders), await served(codes, 1, folders)
    compare(found, expected, tolerance=0.03)  # columns became float16


async def test_quantised_weights_take_adapters_between_blocks(tmp_path: Path) -> None:
    """In a GGUF file, rows of queries and keys are also in another order."""
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 768}
    case = FamilyCase("llama", "LlamaForCausalLM", {**LLAMA.config, **sizes}, ())
    made = make(case, tmp_path, {"*embed*": "Q8_0", "*lm_head*": "Q8_0", "*": "Q4_K"})
    layer = "base_model.model.model.layers.1"
    shapes = {
        f"{layer}.self_attn.{name}_proj": (rows, 512) for name, rows in (("q", 512), ("k", 128), ("o", 512))
    }
    shapes[f"{layer}.mlp.down_proj"] = (512, 768)
    folders = [write_adapter(tmp_path / "adapter", shapes), None, None]
    compare(await served(made.files, 2, folders), await served(made.files, 1, folders))


async def test_adapters_come_and_go_while_others_run(uneven: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory holds one; each lease of the other drops it in all shards, and reads it again later."""
    dropped: list[int] = []
    drop = OtherAdapters.drop

    def noting(others: OtherAdapters, number: int) -> None:
        dropped.append(number)
        drop(others, number)

    monkeypatch.setattr(OtherAdapters, "drop", noting)
    async with serving(uneven.files, 2) as loaded:
        loader = loaded.adapters
        assert loader is not None
        named = [AdapterSource("one", str(uneven.one)), AdapterSource("two", str(uneven.two))]
        adapters = Adapters(lambda source: loader.load(Path(source.location)), named, max_loaded=1)
        await adapters.start()
        try:
            for turn, (name, folder) in enumerate([("one", uneven.one), ("two", uneven.two)] * 2):
                beside = asyncio.create_task(generate(loaded.runner, [Job(PROMPTS[0], 30, SCORED)]))
                lease: Lease = await adapters.lease(name)
                await beside
                job = Job(PROMPTS[1], 6, SCORED, adapter=lease.adapter.weights)
                await generate(loaded.runner, [job])
                assert_follows(job, uneven.path, folder)
                lease.release()
                del job, lease
                gc.collect()
                # Both were read at the start already, the second in the place of the first.
                assert dropped == list(range(1, turn + 3))
        finally:
            adapters.close()
        assert loaded.shards is not None
        processes = list(loaded.shards.others.processes)
    assert [process.returncode for process in processes] == [0]  # it exits by itself


async def test_an_adapter_that_cannot_be_read_fails_alone_with_its_reason(
    uneven: Base, tmp_path: Path
) -> None:
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
    large = write_adapter(tmp_path / "large", {q_proj: (96, 96)}, rank=65)
    other = write_adapter(tmp_path / "other", {q_proj: (64, 96)}, rank=4)
    async with serving(uneven.files, 2) as loaded:
        loader = loaded.adapters
        assert loader is not None
        adapters = Adapters(lambda source: loader.load(Path(source.location)), max_loaded=2)
        try:
            for folder, reason in ((large, "rank 65; --max-lora-rank allows 64"), (other, "[96, 4]")):
                with pytest.raises(InvalidRequest) as failed:
                    await adapters.add("x", str(folder))
                assert reason in failed.value.message
            await adapters.add("x", str(uneven.two))
            lease = await adapters.lease("x")
            job = Job(PROMPTS[0], 6, SCORED, adapter=lease.adapter.weights)
            await generate(loaded.runner, [job])
            assert_follows(job, uneven.path, uneven.two)
        finally:
            adapters.close()


async def test_a_shard_that_dies_fails_the_load_and_is_reported(tiny: Base) -> None:
    async with serving(tiny.files, 2) as loaded:
        assert loaded.shards is not None
        lost = threading.Event()
        loaded.shards.others.watch(lambda reason: lost.set())
        (process,) = loaded.shards.others.processes
        process.kill()
        process.wait()
        with pytest.raises(ModelLoadError, match="shard 1 of the model: it has ended"):
            read(loaded, tiny.one)
        assert lost.wait(10)


async def test_memory_counts_every_shard_s_part(tiny: Base) -> None:
    """`down` of q, k, v, gate and up, and `up` of o and down, are in each of them; the rest is divided."""
    sizes = {}
    for count in (1, 2, 4):
        async with serving(tiny.files, count, dtype="bfloat16") as loaded:
            assert loaded.adapters is not None
            sizes[count] = loaded.adapters.load(tiny.one).num_bytes
    hidden, layers, rank = 64, 2, 8
    repeated = 2 * 7 * hidden * layers * rank  # bytes of the sides as long as the residual
    assert repeated <= sizes[2] - sizes[1] <= 2 * repeated
    assert 2 * repeated <= sizes[4] - sizes[2] <= 4 * repeated


class Shard:
    """Another shard's thread, with a script instead of a loader."""

    def __init__(self, descriptor: int) -> None:
        self.kept: list[int] = []
        self.reason: Exception | None = None
        self.digest = b"same"
        self.has_dropped = threading.Event()
        follow_adapters(descriptor, cast(AdapterLoader[Any], self), self.keep, self.drop)

    def load(self, directory: Path, number: int) -> Any:
        if self.reason is not None:
            raise self.reason
        return LoadedAdapter(number, self.digest, 1, 100)

    def keep(self, number: int) -> None:
        self.kept.append(number)

    def drop(self, number: int) -> None:
        if number in self.kept:
            self.kept.remove(number)
        self.has_dropped.set()


class Weights:
    """Weights that can be watched."""


class Own:
    """Shard 0's loader."""

    layout = None

    def load(self, directory: Path, number: int) -> Any:
        return LoadedAdapter(Weights(), b"same", 1, 100)


@contextmanager
def three_shards() -> Iterator[tuple[SplitAdapterLoader, list[Shard]]]:
    others = OtherAdapters(2)
    try:
        shards = [Shard(descriptor) for descriptor in others.descriptors]
        yield SplitAdapterLoader(cast(AdapterLoader[Any], Own()), others), shards
    finally:
        others.close()


def wait_for_drops(shards: Sequence[Shard]) -> None:
    for shard in shards:
        assert shard.has_dropped.wait(10)
        shard.has_dropped.clear()


def test_all_shards_keep_an_adapter_as_long_as_it_is_used() -> None:
    with three_shards() as (loader, shards):
        loaded = loader.load(Path("a"))
        assert [shard.kept for shard in shards] == [[1], [1]] and loaded.num_bytes == 300
        del loaded
        gc.collect()
        wait_for_drops(shards)
        assert [shard.kept for shard in shards] == [[], []]


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (ModelLoadError("/a: tensor 'x' is damaged"), "shard 2 of the model: /a: tensor 'x' is damaged"),
        (MemoryError("no memory"), r"shard 2 of the model: MemoryError\('no memory'\)"),
    ],
)
def test_a_failure_of_one_shard_leaves_no_part_in_the_others(reason: Exception, message: str) -> None:
    with three_shards() as (loader, shards):
        shards[1].reason = reason
        with pytest.raises(ModelLoadError, match=message):
            loader.load(Path("a"))
        wait_for_drops(shards)
        assert [shard.kept for shard in shards] == [[], []]
        shards[1].reason = None
        loaded = loader.load(Path("a"))  # a new number, and the pipes are where they should be
        assert [shard.kept for shard in shards] == [[2], [2]]
        del loaded


def test_shards_that_have_read_different_files_refuse_the_adapter() -> None:
    with three_shards() as (loader, shards):
        shards[0].digest = b"changed"
        with pytest.raises(ModelLoadError, match="the files changed while they were read"):
            loader.load(Path("a"))
        wait_for_drops(shards)
        assert [shard.kept for shard in shards] == [[], []]


def test_nothing_is_read_after_the_end() -> None:
    with three_shards() as (loader, _):
        pass
    with pytest.raises(ModelLoadError, match="the shards of the model have ended"):
        loader.load(Path("a"))


def test_a_program_keeps_adapters_of_its_own_layout_once() -> None:
    layout, other = _C.AdapterLayout([(64, 32, 8)]), _C.AdapterLayout([(64, 32, 8)])
    program = _C.Program(max_tokens=8, max_sequences=4, max_rows=4, max_context=64)
    with pytest.raises(ValueError, match="must be of this program's layout"):
        program.keep_adapter(_C.Adapter(layout, [], 3))
    program.set_adapters(layout)
    program.keep_adapter(_C.Adapter(layout, [], 3))
    with pytest.raises(ValueError, match="there is an adapter 3 already"):
        program.keep_adapter(_C.Adapter(layout, [], 3))
    with pytest.raises(ValueError, match="must be of this program's layout"):
        program.keep_adapter(_C.Adapter(other, [], 4))
    for _ in range(2):  # what is not there is not an error
        program.drop_adapter(3)
    program.keep_adapter(_C.Adapter(layout, [], 3))
    with pytest.raises(ValueError, match="`number` must not be negative, got -1"):
        _C.Adapter(layout, [], -1)
