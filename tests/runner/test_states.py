"""Models with recurrent layers: how many sequences run at once, and which variants are refused."""

from __future__ import annotations

import pytest

from tests.runner.test_load import settings
from tests.support.families_page import config_of
from tests.support.family_case import FamilyCase
from tests.support.family_channels import CHANNEL_CASES
from tests.support.family_files import checkpoint
from tests.support.family_states import STATE_CASES
from tgi_asgi.errors import ModelLoadError, NotInFamily
from tgi_asgi.models.loading.recognise import is_native, read_config
from tgi_asgi.runner import cpu_load
from tgi_asgi.runner import load as loading
from tgi_asgi.runner.memory import choose_kept_states, fitting_batch, kept_state_bytes, state_bytes
from tgi_asgi.runner.plan import SlotStart, StepPlan, StepResult, StepRow
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.settings import GivenRope
from tgi_asgi.types import SamplingParams

LFM2 = STATE_CASES[0]


def case_named(name: str) -> FamilyCase:
    return next(case for case in (*STATE_CASES, *CHANNEL_CASES) if case.name == name)


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("lfm2", 2 * 4 * 2 * 2 * 128),  # two places, two layers, two tokens of 128 channels
        ("granite_hybrid-dense", 2 * 4 * 3 * (2 * 352 + 256 * 24)),
        ("qwen3_5", 2 * 4 * 3 * (3 * 224 + 128 * 24)),
        ("falcon_h1", 2 * 4 * 2 * (2 * 288 + 192 * 24)),
    ],
)
def test_what_the_states_of_a_sequence_take_is_counted(
    name: str, each: int, caplog: pytest.LogCaptureFixture
) -> None:
    _, config = read_config(config_of(case_named(name)))
    assert state_bytes(config) == each
    assert fitting_batch(config, 7, 14 * each) == 7
    assert not caplog.records
    assert fitting_batch(config, 7, 14 * each - 1) == 6
    assert "6 sequences run at once, not the 7 of --max-batch-size" in caplog.text
    with pytest.raises(ModelLoadError, match="the states of a sequence take"):
        fitting_batch(config, 7, 2 * each - 1)


def test_a_step_behind_a_failed_one_cannot_begin_with_a_state_from_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = loading.load(settings(max_batch_size=1), checkpoint(LFM2), lambda *_: None).runner
    assert isinstance(runner, HostRunner)
    prompt, table = [5, 6, 7], [[0]]

    def again(first: int, step_id: int) -> StepPlan:
        start = SlotStart(0, SamplingParams(temperature=0.0), 0, prompt, output_ids=[first])
        return StepPlan(step_id, [StepRow(0, [first], 3, table, samples=True)], [start])

    begun = [SlotStart(0, SamplingParams(temperature=0.0), 0, prompt)]
    first = runner.run(StepPlan(0, [StepRow(0, prompt, 0, table, samples=True)], begun)).sampled[0]
    assert first is not None
    expected = runner.run(StepPlan(1, [StepRow(0, None, 3, table, samples=True)])).sampled  # void
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="planted"):
        patch.setattr(runner._masks, "start", _fail)
        runner.run(again(first.token_id, 2))
    with pytest.raises(ValueError, match="no state of 4 tokens"):
        runner.run(StepPlan(3, [StepRow(0, None, 4, table, samples=True)]))
    assert runner.run(again(first.token_id, 4)).sampled == expected
    runner.close()


async def test_a_step_that_fails_outside_of_python_leaves_no_state_from_before_it_either() -> None:
    runner = loading.load(settings(max_batch_size=2), checkpoint(LFM2), lambda *_: None).runner
    prompt, table = [5, 6, 7], [[0]]
    begun = [SlotStart(0, SamplingParams(temperature=0.0), 0, prompt)]
    result = await runner.submit(StepPlan(0, [StepRow(0, prompt, 0, table, samples=True)], begun))
    [first] = result.sampled
    assert first is not None
    expected = await runner.submit(StepPlan(1, [StepRow(0, None, 3, table, samples=True)]))  # void
    again = StepRow(0, [first.token_id], 3, table, samples=True)
    other = StepRow(1, None, 5, [[1]], samples=True, stop=9)
    with pytest.raises(RuntimeError, match="slot 1 is at"):
        await runner.submit(StepPlan(2, [again, other]))
    with pytest.raises(RuntimeError, match="no state of 4 tokens"):
        await runner.submit(StepPlan(3, [StepRow(0, None, 4, table, samples=True)]))
    assert (await runner.submit(StepPlan(4, [again]))).sampled == expected.sampled
    runner.close()


def test_a_step_behind_one_that_failed_late_cannot_overwrite_the_state_from_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows with drafts begin where their slots are, and the failed step has moved them on."""
    runner = loading.load(settings(max_batch_size=1), checkpoint(LFM2), lambda *_: None).runner
    assert isinstance(runner, HostRunner)
    compute = runner._compute
    begun = [SlotStart(0, SamplingParams(temperature=0.0), 0, [5, 6, 7])]
    runner.run(StepPlan(0, [StepRow(0, [5, 6, 7], 0, [[0]], samples=True)], begun))

    def computed_in_vain(plan: StepPlan) -> StepResult:
        compute(plan)
        raise RuntimeError("planted")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="planted"):
        patch.setattr(runner, "_compute", computed_in_vain)
        runner.run(StepPlan(1, [StepRow(0, None, 3, [[0]], samples=True, stop=5)]))
    with pytest.raises(ValueError, match="no state of 4 tokens"):
        runner.run(StepPlan(2, [StepRow(0, None, 4, [[0]], samples=True, stop=6)]))
    runner.run(StepPlan(3, [StepRow(0, [8], 3, [[0]], samples=True)], begun))
    runner.close()


def _fail(start: SlotStart) -> None:
    raise RuntimeError("planted")


def test_models_without_states_run_as_many_as_they_may() -> None:
    from tests.support.families import CASES

    _, config = read_config(config_of(CASES[0]))
    assert state_bytes(config) == 0
    assert fitting_batch(config, 128, 0) == 128


def test_a_server_runs_as_many_sequences_as_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda: 16 << 20)
    monkeypatch.setattr(
        cpu_load, "fitting_batch", lambda config, most, free, drafts: fitting_batch(config, most, 60_000)
    )
    loaded = loading.load(settings(max_batch_size=128), checkpoint(LFM2), lambda *_: None)
    loaded.runner.close()
    assert loaded.runner.traits.max_batch_size == loaded.info.max_batch_size == 30_000 // 4096


@pytest.mark.parametrize(
    ("wanted", "cache", "free", "number"),
    [
        (None, 100, 1000, 100),
        (None, 1, 1000, 8),  # at least a few
        (None, 1 << 30, 1 << 40, 1 << 16),
        (None, 100, 20, 10),
        (None, 100, 1, 0),
        (0, 100, 1000, 0),
        (500, 0, 1000, 500),
    ],
)
def test_as_many_states_are_kept_as_have_room(wanted: int | None, cache: int, free: int, number: int) -> None:
    """Give sizes in states, the cache's in tens; kept states use at most half of the free memory."""
    _, config = read_config(config_of(LFM2))
    each = state_bytes(config) // 2
    assert kept_state_bytes(config) == each
    assert choose_kept_states(config, wanted, cache * 10 * each, free * each) == number
    with pytest.raises(ModelLoadError, match=r"--max-kept-states 501 .* set it to at most 500"):
        choose_kept_states(config, 501, 0, 1000 * each)


def test_models_without_states_keep_none() -> None:
    from tests.support.families import CASES

    _, config = read_config(config_of(CASES[0]))
    assert choose_kept_states(config, 100, 1 << 30, 1 << 40) == 0


def test_kept_states_take_from_the_room_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda: 16 << 20)
    sizes = {}
    for number in (0, 1000):
        loaded = loading.load(settings(max_kept_states=number), checkpoint(LFM2), lambda *_: None)
        loaded.runner.close()
        assert loaded.runner.traits.num_kept_states == loaded.info.num_kept_states == number
        assert loaded.info.kept_state_bytes == number * 2048
        sizes[number] = loaded.info.kv_bytes
    assert 0 <= sizes[0] - sizes[1000] <= 1000 * 2048


def test_drafts_take_room_for_their_states(caplog: pytest.LogCaptureFixture) -> None:
    loaded = loading.load(settings(speculate=8), checkpoint(LFM2), lambda *_: None)
    loaded.runner.close()
    assert isinstance(loaded.runner, HostRunner)
    assert loaded.runner.traits.drafts is not None and not caplog.records
    _, config = read_config(config_of(LFM2))
    each = state_bytes(config, 8)
    assert each == 9 * state_bytes(config)
    assert fitting_batch(config, 7, 14 * each - 1, 8) == 6
    assert "the states of each take 0.000 GiB with 8 drafts" in caplog.text


def test_positions_of_layers_that_attend_may_be_stretched() -> None:
    """Check that recurrent layers, which have no positions, are left alone."""
    from tgi_asgi.models.rope import scale_positions

    _, config = read_config(config_of(LFM2))
    scaled = scale_positions(config, GivenRope("linear", 4.0))
    assert [layer.rope is None for layer in scaled.layers] == [True, False, True, False]
    assert scaled.context_length == 4 * config.context_length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["conv", "mamba", "conv", "conv"]}, "layer_types must be 4 of conv, full_attention"),
        ({"layer_types": ["conv"]}, "layer_types must be 4 of"),
        ({"conv_L_cache": 17}, r"convolution must be 2\.\.16, got 17"),
        ({"block_multiple_of": 0}, "block_multiple_of must be positive"),
        ({"conv_activation": "gelu"}, "conv_activation"),
    ],
    ids=str,
)
def test_convolutions_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read_config({**config_of(LFM2), **changes})


def test_a_convolution_over_one_token_is_left_to_the_code_of_transformers() -> None:
    with pytest.raises(NotInFamily, match=r"convolution must be 2\.\.16, got 1"):
        read_config({**config_of(LFM2), "conv_L_cache": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mamba_n_heads": 7}, "7 heads of states cannot share 256 channels"),
        ({"mamba_n_heads": 32}, "multiples of 16 wide"),
        ({"mamba_n_groups": 3}, "must divide its 8 heads, got 3"),
        ({"mamba_d_state": 0}, "state_size must be in 1"),
        ({"mamba_d_conv": 1}, r"convolution must be 2\.\.16, got 1"),
        ({"time_step_limit": [1.0]}, "time_step_limit must be two numbers"),
        ({"time_step_limit": [0.5, 0.1]}, "time steps cannot be clamped to"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"layer_types": ["mamba", "rwkv", "mamba", "mamba"]}, "layer_types must be 4 of"),
    ],
    ids=str,
)
def test_state_spaces_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read_config({**config_of(case_named("granite_hybrid-dense")), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mamba_d_ssm": 24 * 4}, "multiples of 16 wide"),
        ({"ssm_multipliers": [1.0, 0.5]}, "ssm_multipliers must be 5 numbers"),
        ({"mlp_multipliers": [1.0, "0.5"]}, "mlp_multipliers must be 2 numbers"),
        ({"mlp_multipliers": [0.0, 0.5]}, "mlp_multipliers must be positive"),
        ({"ssm_multipliers": [1.0, 1.0, 0.0, 1.0, 1.0]}, "the factors of a state must be positive"),
        ({"ssm_in_multiplier": -1.0}, "the factors of a layer's parts must be positive"),
        ({"key_multiplier": 0}, "the scale of scores must be positive"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"residual_multiplier": 2.0}, "`residual_multiplier` is 2.0"),
    ],
    ids=str,
)
def test_layers_side_by_side_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read_config({**config_of(case_named("falcon_h1")), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_num_value_heads": 5}, "must divide its 5 heads, got 2"),
        ({"linear_num_key_heads": 0}, "num_key_heads must be in 1"),
        ({"linear_value_head_dim": 24}, "multiples of 16 wide, got 24"),
        ({"linear_key_head_dim": 257}, r"key_dim must be in 1\.\.256, got 257"),
        ({"linear_conv_kernel_dim": 1}, r"convolution must be 2\.\.16, got 1"),
        ({"linear_key_head_dim": "24"}, "`linear_key_head_dim` must be one integer"),
        ({"layer_types": ["linear_attention"]}, "layer_types must be 4 of"),
        ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval must be positive"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"attention_bias": True}, "`attention_bias` is True, only False is supported"),
        ({"attn_output_gate": False}, "`attn_output_gate` is False, only True"),
        ({"text_config": 3}, "text_config must be an object"),
        ({"text_config": {**config_of(case_named("qwen3_5")), "rope_scale": 2}}, "`rope_scale` is 2"),
    ],
    ids=str,
)
def test_delta_nets_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read_config({**config_of(case_named("qwen3_5")), **changes})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mamba", {"state_size": 0}, "a channel's state_size must be in 1"),
        ("mamba", {"time_step_rank": 0}, "a channel's rank must be in 1"),
        ("mamba", {"time_step_rank": "all"}, "`time_step_rank` must be one integer"),
        ("mamba", {"conv_kernel": 17}, r"convolution must be 2\.\.16, got 17"),
        ("mamba", {"intermediate_size": 0}, "channels of a convolution must be in 1"),
        ("mamba", {"intermediate_size": 1 << 17}, "channels of a convolution must be in 1"),
        ("mamba", {"num_hidden_layers": 0}, "num_hidden_layers must be in 1"),
        ("mamba", {"max_position_embeddings": 1 << 40}, "max_position_embeddings must be in 1"),
        ("mamba", {"residual_multiplier": 2.0}, "`residual_multiplier` is 2.0"),
        ("falcon_mamba", {"mixer_rms_eps": 0.0}, "the norms of a state need a positive epsilon"),
        ("jamba", {"attn_layer_offset": 2}, r"attn_layer_offset must be in 0\.\.1, got 2"),
        ("jamba", {"expert_layer_period": 0}, "expert_layer_offset must be in"),
        ("jamba", {"hidden_act": "gelu"}, "hidden_act must be silu"),
        ("jamba", {"num_experts_per_tok": 5}, r"experts of a token must be 1\.\.4, got 5"),
    ],
    ids=str,
)
def test_channels_with_states_that_cannot_be_are_refused(
    name: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read_config({**config_of(case_named(name)), **changes})


@pytest.mark.parametrize(("named", "context"), [(None, 1 << 17), (300, 300)])
def test_a_model_without_positions_has_the_context_of_transformers_code(
    named: int | None, context: int
) -> None:
    config = {**config_of(case_named("mamba")), "max_position_embeddings": named}
    assert read_config(config)[1].context_length == context


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mamba", {"hidden_act": "gelu"}),
        ("mamba", {"conv_kernel": 1}),
        ("mamba", {"intermediate_size": 72}),
        ("jamba", {"sliding_window": 8}),
        ("jamba", {"head_dim": 33}),
        ("qwen3_5", {"linear_value_head_dim": 24}),
        ("qwen3_5", {"linear_key_head_dim": 320}),
        ("qwen3_5", {"attention_bias": True}),
        ("granite_hybrid-dense", {"mamba_n_heads": 128}),
        ("falcon_h1", {"mamba_d_ssm": 72}),
        ("falcon_h1", {"mamba_d_conv": 17}),
        ("falcon_h1", {"mlp_bias": True}),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_have_is_left_to_transformers(name: str, changes: dict[str, object]) -> None:
    config = config_of(case_named(name))
    read_config(config)
    with pytest.raises(NotInFamily):
        read_config({**config, **changes})


def test_a_model_that_sees_is_left_to_transformers() -> None:
    config = config_of(case_named("qwen3_5"))
    assert is_native(config)
    assert not is_native({**config, "vision_config": {"depth": 2}})


def test_the_text_of_a_model_that_sees_is_read_from_its_part() -> None:
    config = config_of(case_named("qwen3_5"))
    whole = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": {**config, "tie_word_embeddings": False},
        "vision_config": {"depth": 2},
        "tie_word_embeddings": True,
    }
    found, expected = read_config(whole)[1], read_config(config)[1]
    assert found.has_tied_embeddings
    assert found.layers == expected.layers
