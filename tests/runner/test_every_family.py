"""For every family, an answer equals that of the same request alone, to the last bit.

The expected answers come from requests that run alone and whole, without a prefix cache, one choice after the
other. Then the same requests run among thirty-two, in chunks, with drafts, adapters and grammars, in so few
blocks that some are preempted; and once more, from the prefix cache.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.families import CASES
from tests.support.family_case import FamilyCase
from tests.support.family_files import checkpoint
from tests.support.letters import AUTO, letters_grammar
from tests.support.like_llama import LIKE_LLAMA
from tests.support.real_engine import all_at_once, client_view, one_by_one, serving
from tgi_asgi.engine.preemption import choose_victim
from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.engine.step import Step
from tgi_asgi.models.loading.recognise import architecture_of, with_architecture
from tgi_asgi.models.registry import all_families
from tgi_asgi.ops.cpu_program import CpuProgram
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.types import Adapter, GenerationRequest, SamplingParams, StopConditions

pytestmark = pytest.mark.usefixtures("drafts_are_free")

NUM_PROBES, NUM_OTHERS = 8, 24
# Names that some checkpoints use for another architecture.
ALIASES = {
    "RWForCausalLM",
    "StableLMEpochForCausalLM",
    "Ernie4_5_ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
}
MORE_CASES = {"gemma4-shared"}  # layers without keys of their own
USUAL = {"LlamaForCausalLM", "BloomForCausalLM", "StableLmForCausalLM", "Lfm2ForCausalLM"}
USUAL_IN_FLOAT32 = {"BloomForCausalLM", "Lfm2ForCausalLM"}

# Layers that overwrite their state of a sequence.
RECURRENT = {
    "Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "FalconH1ForCausalLM",
    "Lfm3ForCausalLM",
    "BambaForCausalLM",
    "NemotronHForCausalLM",
    "Mamba2ForCausalLM",
    "MambaForCausalLM",
    "FalconMambaForCausalLM",
    "JambaForCausalLM",
}
LATENT = {"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "MiniCPM3ForCausalLM"}


def one_case_each() -> list[Any]:
    """Return the last case of each architecture, which is rarely the plainest, and `MORE_CASES`."""
    by_architecture = {case.served_as: case for case in CASES if case.max_total_tokens is None}
    more = [(case.served_as, case) for case in CASES if case.name in MORE_CASES]
    found = []
    for architecture, case in [*by_architecture.items(), *more]:
        marks = [] if architecture in USUAL else [pytest.mark.models]
        found.append(pytest.param(case, id=case.name, marks=marks))
    return found


@pytest.fixture(autouse=True)
def preemption_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preempt one sequence in every ninth step if several run, regardless of free blocks."""
    steps = itertools.count()
    plan_decodes = Scheduler._plan_decodes

    def plan(scheduler: Scheduler, step: Step) -> list[Sequence]:
        if next(steps) % 9 == 8 and len(scheduler.running) > 1:
            scheduler._suspend(choose_victim(scheduler.running, scheduler.tables))
            scheduler._stats.preemptions += 1
        return plan_decodes(scheduler, step)

    monkeypatch.setattr(Scheduler, "_plan_decodes", plan)


def requests_of(case: FamilyCase, adapters: list[Adapter | None]) -> list[GenerationRequest]:
    """Make the probes, then the others: repetitive texts, some with a common prefix."""
    rng = random.Random(7)
    size = case.config["vocab_size"]
    grammars = [letters_grammar(each, size) for each in (sources.regex("[a-z]{5,9}(-ab-ab){2,6}[0-9]"), AUTO)]
    common = [rng.randrange(2, 97) for _ in range(40)]
    made = []
    for number in range(NUM_PROBES + NUM_OTHERS):
        period = [rng.randrange(2, 97) for _ in range(rng.randrange(1, 9))]
        prompt = [period[at % len(period)] for at in range(rng.randrange(3, 58))]
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.2, 1.0]),
            top_k=rng.choice([0, 0, 8]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.1]),
            seed=number,
            logprobs=rng.choice([None, 2]),
        )
        made.append(
            GenerationRequest(
                f"r{number}",
                common + prompt if number % 3 == 0 else prompt,
                sampling,
                StopConditions(max_tokens=rng.choice([12, 60]), ignore_eos=number % 4 != 1),
                grammar=grammars[number // 4 % 2] if number % 4 == 1 else None,
                adapter=adapters[number % len(adapters)],
                prompt_logprobs=1 if number == 2 else None,
                n=3 if number in (0, 3) else 1,
            )
        )
    return made


def in_both_arithmetics() -> list[Any]:
    """Return the cases in both, of which the default one is usual, and float32 for two models."""
    found = []
    for case, dtype in itertools.product(one_case_each(), ["auto", "float32"]):
        is_usual = dtype == "auto" or case.values[0].served_as in USUAL_IN_FLOAT32
        marks = case.marks if is_usual else [pytest.mark.models]
        found.append(pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}", marks=marks))
    return found


@pytest.mark.parametrize(("case", "dtype"), in_both_arithmetics())
async def test_an_answer_is_that_of_the_lone_request(case: FamilyCase, dtype: str, tmp_path: Path) -> None:
    files = checkpoint(case)
    settings: dict[str, Any] = {"dtype": dtype, "max_total_tokens": 160}
    apart = {"max_batch_size": 1, "prefix_cache": False, "max_kept_states": 0}
    async with serving(files, tmp_path / "a", **settings, **apart) as (engine, adapters):
        expected = await one_by_one(engine, requests_of(case, adapters)[:NUM_PROBES])
        assert engine.stats.preemptions == engine.stats.prefix_hit_tokens == 0
    busy = {
        "max_batch_size": 32,
        "max_batch_prefill_tokens": 37,
        "max_batch_total_tokens": 256,
        "speculate": 8,
    }
    async with serving(files, tmp_path / "b", **settings, **busy) as (engine, adapters):
        requests = requests_of(case, adapters)
        among = await all_at_once(engine, requests)
        stats = engine.stats
        assert stats.preemptions > 0
        assert stats.accepted_draft_tokens > 0
        before = stats.prefix_hit_tokens
        twice = [request for request in requests[:NUM_PROBES] for _ in range(2)]
        cached = (await one_by_one(engine, twice))[1::2]
        assert stats.prefix_hit_tokens > before
        assert engine.scheduler.pool.num_used == 0
    for request, lone, busy_one, cached_one in zip(requests, expected, among, cached, strict=False):
        assert client_view(busy_one) == client_view(lone), request
        assert client_view(cached_one) == client_view(lone), request
        assert busy_one.stats.prompt_logprobs == lone.stats.prompt_logprobs, request
    ids = [tuple(token for token, *_ in client_view(answer)) for answer in expected]
    assert len(set(ids)) == len(ids), "adapters, seeds or grammars have no effect"


@pytest.fixture
def steps_fail(case: FamilyCase, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make a quarter of the steps with several rows fail; return the list of their numbers of rows.

    A failed step has sampled nothing, but has written keys, values and states. The distances are random: if
    every fourth step failed, a scored prompt of four chunks could lose each of its attempts.
    """
    failed: list[int] = []
    rng = random.Random(1)
    steps = itertools.count(1)
    next_failure = 4
    run, run_and_sample = CpuProgram.run, CpuProgram.run_and_sample

    def fail(program: CpuProgram, batch: Any, rows: Any) -> None:
        nonlocal next_failure
        num_rows = len(batch.row_slots)
        if num_rows > 1 and next(steps) == next_failure:
            next_failure += rng.randint(2, 6)
            failed.append(num_rows)
            run(program, batch, rows)
            raise RuntimeError("planted")

    def fail_or_run(program: CpuProgram, batch: Any, rows: Any) -> Any:
        fail(program, batch, rows)
        return run(program, batch, rows)

    def fail_or_sample(program: CpuProgram, batch: Any, rows: Any, *others: Any) -> Any:
        fail(program, batch, rows)
        return run_and_sample(program, batch, rows, *others)

    monkeypatch.setattr(CpuProgram, "run", fail_or_run)
    monkeypatch.setattr(CpuProgram, "run_and_sample", fail_or_sample)
    monkeypatch.setattr(HostRunner, "_has_only_rows", lambda runner, plan: False)  # else `fail` is bypassed
    return failed


@pytest.mark.parametrize(
    "case",
    [
        each
        for each in one_case_each()
        if each.values[0].served_as in RECURRENT | LATENT | {"LlamaForCausalLM"}
    ],
)
async def test_a_step_that_failed_changes_no_answer(
    case: FamilyCase, steps_fail: list[int], tmp_path: Path
) -> None:
    files = checkpoint(case)
    settings: dict[str, Any] = {"dtype": "auto", "max_total_tokens": 160}
    apart = {"max_batch_size": 1, "prefix_cache": False, "max_kept_states": 0}
    async with serving(files, tmp_path / "a", **settings, **apart) as (engine, adapters):
        expected = await one_by_one(engine, requests_of(case, adapters)[:NUM_PROBES])
    assert not steps_fail
    busy = {"max_batch_size": 12, "max_batch_prefill_tokens": 37, "speculate": 8}
    async with serving(files, tmp_path / "b", **settings, **busy) as (engine, adapters):
        requests = requests_of(case, adapters)[:NUM_PROBES]
        found = await all_at_once(engine, requests)
        assert engine.stats.failed_steps == len(steps_fail) > 5
        assert engine.stats.accepted_draft_tokens > 0
        assert engine.scheduler.pool.num_used == 0
    for request, lone, one in zip(requests, expected, found, strict=True):
        assert client_view(one) == client_view(lone), request


def test_every_architecture_has_a_case() -> None:
    architectures = {family.architecture for family in all_families() if not family.is_gguf_only}
    others = {architecture_of(with_architecture(case.published)) for case in LIKE_LLAMA if case.is_read}
    assert architectures - ALIASES == {case.served_as for case in CASES} | others


def test_aliases_compute_what_another_architecture_does() -> None:
    for alias in (family for family in all_families() if family.architecture in ALIASES):
        others = [
            family
            for family in all_families()
            if family.architecture not in ALIASES
            and (family.model, family.read_config) == (alias.model, alias.read_config)
        ]
        assert others, alias.architecture
