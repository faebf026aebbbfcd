"""Rotary positions beyond the original context: as the model or the administrator configures them.

The reference is `transformers`, whose tables depend on the longest position of a call: its logits come from
one call with the whole served context.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.support.checkpoints import LLAMA3_SCALING, make_model, reference_logits, save, save_gguf
from tests.support.generic import run_steps
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.generic.encoder import EncoderModel
from tgi_asgi.models.generic.rope import scale_positions as scale_positions_of_transformers
from tgi_asgi.models.gguf_vision.text_reading import read_rope
from tgi_asgi.models.layer_spec import LayerSpec, RopeScaling, RopeSpec
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.loading.recognise import read_config
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.rope import inverse_frequencies, scale_positions
from tgi_asgi.runner.memory import choose_context
from tgi_asgi.settings import GivenRope

ORIGINAL, SERVED = 64, 112
IDS = [(7 * index) % 150 + 3 for index in range(SERVED)]
STEPS = (((0, 0, 50),), ((0, 50, 40),), *(((0, at, 1),) for at in range(90, SERVED)))
KINDS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": ORIGINAL},
}


def difference(
    files: ModelFiles, expected: torch.Tensor, rope: GivenRope | None = None, impl: str = "auto"
) -> float:
    """Return `Outcome.difference` for a context in chunks and steps of one token."""
    with OpenModel(files, model_impl=impl, rope=rope) as opened:
        model = opened.load(ops.Packing(is_exact=True), SERVED)
    assert not isinstance(model, EncoderModel)
    return run_steps(model, [IDS], [expected.numpy()], STEPS, max_context=SERVED)


@pytest.mark.parametrize("context", [30, ORIGINAL, ORIGINAL + 1, 100, 4 * ORIGINAL])
@pytest.mark.parametrize(
    ("theta", "head_dim", "factor"), [(10000.0, 64, 2.0), (5e5, 128, 8.0), (1e4, 6, 1.0)]
)
def test_the_dynamic_table_is_that_of_transformers_for_the_context_served(
    context: int, theta: float, head_dim: int, factor: float
) -> None:
    scaling = {"rope_type": "dynamic", "factor": factor, "rope_theta": theta}
    config = transformers.LlamaConfig(
        head_dim=head_dim, max_position_embeddings=ORIGINAL, rope_parameters=scaling
    )
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=context)
    spec = RopeSpec(head_dim, theta, RopeScaling("dynamic", factor, ORIGINAL))
    found = inverse_frequencies(spec, max_positions=context)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-7)


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_dynamic_scaling_of_a_configuration_equals_transformers(tmp_path: Path, impl: str) -> None:
    model = make_model(max_position_embeddings=ORIGINAL, rope_scaling=KINDS["dynamic"])
    files = save(model, tmp_path)
    expected = reference_logits(model, IDS)
    assert difference(files, expected, impl=impl) < 1e-4
    plain = make_model(max_position_embeddings=ORIGINAL)
    assert difference(files, reference_logits(plain, IDS), impl=impl) > 0.01


@pytest.mark.parametrize("factor", [32.0, 64.0])
def test_yarn_without_a_ramp_equals_transformers(tmp_path: Path, factor: float) -> None:
    """Kimi K2's, whose bounds are equal."""
    scaling = {**KINDS["yarn"], "factor": factor, "beta_fast": 1.0, "beta_slow": 1.0}
    model = make_model(max_position_embeddings=ORIGINAL, rope_scaling=scaling)
    assert difference(save(model, tmp_path), reference_logits(model, IDS)) < 1e-4


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_divisors_of_a_gguf_file_come_with_any_scaling(kind: str) -> None:
    spec = RopeSpec(16, 1e4, RopeScaling(kind, 4.0, 64))
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    expected = inverse_frequencies(spec) / divisors
    np.testing.assert_allclose(inverse_frequencies(spec, divisors), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["native", "gguf", "transformers", "generic"])
def test_what_the_administrator_says_equals_a_configuration_that_says_it(
    tmp_path: Path, form: str, kind: str
) -> None:
    architecture = "Phi" if form == "generic" else "Llama"
    model = make_model(architecture, max_position_embeddings=ORIGINAL)
    files = save_gguf(model, tmp_path / "m.gguf", "F32") if form == "gguf" else save(model, tmp_path)
    scaled = make_model(architecture, max_position_embeddings=ORIGINAL, rope_scaling=KINDS[kind])
    scaled.load_state_dict(model.state_dict())
    impl = "transformers" if form in ("transformers", "generic") else "auto"
    assert difference(files, reference_logits(scaled, IDS), GivenRope(kind, 2.0), impl) < 1e-4
    assert difference(files, reference_logits(model, IDS), GivenRope(kind, 2.0), impl) > 0.01


@pytest.mark.parametrize("form", ["native", "gguf", "transformers"])
def test_none_undoes_what_the_model_says(tmp_path: Path, form: str) -> None:
    model = make_model(rope_scaling=LLAMA3_SCALING)
    plain = make_model()
    if form == "gguf":
        files = save_gguf(
            model, tmp_path / "m.gguf", "F32", tensors={"rope_freqs.weight": np.full(8, 3, "f4")}
        )
    else:
        files = save(model, tmp_path)
    impl = "transformers" if form == "transformers" else "auto"
    assert difference(files, reference_logits(plain, IDS), GivenRope("none", 1.0), impl) < 1e-4


def config_of(**keys: Any) -> ModelConfig:
    shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    return read_config(
        {
            "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "max_position_embeddings": 4096,
            **shape, **keys,
        }
    )[1]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "given", "context"),
    [
        ({}, GivenRope("linear", 4.0), 16384),
        ({}, GivenRope("dynamic", 4.0), 16384),
        ({}, GivenRope("yarn", 1.5), 6144),
        ({}, GivenRope("none", 1.0), 4096),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, GivenRope("linear", 2.0), 8192),
        ({"rope_scaling": LLAMA3_SCALING}, GivenRope("linear", 2.0), 128),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
            GivenRope("none", 1.0),
            1024,
        ),
    ],
)
def test_the_context_is_the_first_one_times_the_factor(
    keys: dict[str, Any], given: GivenRope, context: int
) -> None:
    assert scale_positions(config_of(**keys), given).context_length == context
    parsed = transformers.LlamaConfig(
        max_position_embeddings=4096, hidden_size=64, num_attention_heads=4, **keys
    )
    scale_positions_of_transformers(parsed, given)
    assert parsed.max_position_embeddings == (4096 if given.kind == "dynamic" else context)


@pytest.mark.parametrize("impl", ["native", "transformers"])
@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({**KINDS["yarn"]}, 2 * ORIGINAL),
        ({**KINDS["yarn"], "factor": 4.0, "original_max_position_embeddings": ORIGINAL // 2}, 2 * ORIGINAL),
        ({**KINDS["yarn"], "original_max_position_embeddings": ORIGINAL // 4}, ORIGINAL),  # named: longer
        ({**KINDS["linear"]}, 2 * ORIGINAL),
        ({**KINDS["dynamic"]}, ORIGINAL),
        (None, ORIGINAL),
    ],
)
def test_a_scaling_added_to_a_configuration_lengthens_its_context(
    tmp_path: Path, impl: str, scaling: dict[str, Any] | None, context: int
) -> None:
    given = None if scaling is None else dict(scaling)  # a configuration adds keys
    files = save(make_model(max_position_embeddings=ORIGINAL, rope_scaling=given), tmp_path)
    with OpenModel(files, model_impl=impl) as opened:
        assert opened.config.context_length == context
    with OpenModel(files, model_impl=impl, rope=GivenRope("linear", 3.0)) as opened:
        first = (scaling or {}).get("original_max_position_embeddings", ORIGINAL)
        assert opened.config.context_length == 3 * first


@pytest.mark.parametrize("impl", ["native", "transformers"])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
@pytest.mark.parametrize("factor", [1e308, -1e308])
def test_a_factor_that_makes_no_context_is_refused(
    tmp_path: Path, impl: str, kind: str, factor: float
) -> None:
    files = save(make_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": kind, "rope_theta": 1e4, "factor": factor}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="rope scaling factor must be"):
        OpenModel(files, model_impl=impl)


def test_a_dynamic_context_is_as_long_as_it_is_asked_for() -> None:
    config = config_of(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert choose_context(config, None, 1 << 34) == 4096
    assert choose_context(config, 10_000, 1 << 34) == 10_000
    assert choose_context(config_of(), 10_000, 1 << 34) == 4096


def test_layers_with_a_window_keep_a_rotary_embedding_of_their_own() -> None:
    local, whole = RopeSpec(16, 1e4), RopeSpec(16, 1e6)
    config = config_of()
    mixed = ModelConfig(
        **{
            name: getattr(config, name)
            for name in (
                "architecture", "vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads",
                "head_dim", "context_length", "norm_eps",
            )
        },
        layers=(LayerSpec(local, 512, 0.25), LayerSpec(whole, None, 0.25)),
    )  # fmt: skip
    first, second = (layer.rope for layer in scale_positions(mixed, GivenRope("linear", 2.0)).layers)
    assert first == local
    assert second is not None and second.scaling == RopeScaling("linear", 2.0, 4096, is_override=True)
    parsed = transformers.Gemma3TextConfig()
    scale_positions_of_transformers(parsed, GivenRope("linear", 2.0))
    made: dict[str, Any] = parsed.rope_parameters  # type: ignore[assignment]
    kinds = {name: value["rope_type"] for name, value in made.items()}
    assert kinds == {"full_attention": "linear", "sliding_attention": "default"}


def test_a_model_without_rotary_embeddings_has_none_to_scale(tmp_path: Path) -> None:
    files = save(make_model("OPT", ffn_dim=96, word_embed_proj_dim=64), tmp_path)
    with pytest.raises(ModelLoadError, match=r"--rope-scaling: .*'opt' have no rotary embedding"):
        OpenModel(files, model_impl="transformers", rope=GivenRope("linear", 2.0))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("default", None)),
        ({"factor": 1.0}, ("default", None)),
        ({"factor": 0.0}, ("default", None)),
        ({"type": "none", "factor": 4.0}, ("default", None)),
        ({"type": "linear", "factor": 4.0}, ("linear", 4.0)),
        ({"factor": 4.0}, ("linear", 4.0)),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 64}, ("yarn", 4.0)),
    ],
)
def test_files_of_models_that_accept_images_scale_as_in_llama_cpp(
    given: dict[str, Any], expected: tuple[str, float | None]
) -> None:
    """A factor without a type is linear, as in files of text models."""
    metadata = {"general.architecture": "qwen2vl"}
    reader = Reader.of_gguf(
        metadata | {f"qwen2vl.rope.scaling.{key}": each for key, each in given.items()}, frozenset()
    )
    found = read_rope(reader)
    assert (found["rope_type"], found.get("factor")) == expected


def test_yarn_without_a_factor_is_refused() -> None:
    metadata = {"general.architecture": "qwen2vl", "qwen2vl.rope.scaling.type": "yarn"}
    with pytest.raises(ModelLoadError, match=r"lacks `rope.scaling.factor`"):
        read_rope(Reader.of_gguf(metadata, frozenset()))
