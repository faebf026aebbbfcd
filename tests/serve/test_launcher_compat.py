"""Options of TGI's launcher and of clouds: none is silently lost, and none stops a server needlessly."""

from __future__ import annotations

import dataclasses
import socket

import pytest

from tgi_asgi.cli import make_command
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.serve.launcher_compat import (
    OPTIONS,
    CompatOption,
    apply_paths,
    check_options,
    environment_changes,
    simple_level,
)
from tgi_asgi.settings import Settings

# The flags of TGI 3.3.7's launcher.
LAUNCHER = (
    "model_id revision validation_workers sharded num_shard quantize speculate dtype kv_cache_dtype "
    "trust_remote_code max_concurrent_requests max_best_of max_stop_sequences max_top_n_tokens "
    "max_input_tokens max_input_length max_total_tokens waiting_served_ratio max_batch_prefill_tokens "
    "max_batch_total_tokens huggingface_hub_cache weights_cache_override "
    "max_waiting_tokens max_batch_size cuda_graphs hostname port prometheus_port shard_uds_path master_addr "
    "master_port disable_custom_kernels cuda_memory_fraction rope_scaling rope_factor json_output "
    "otlp_endpoint otlp_service_name cors_allow_origin api_key watermark_gamma watermark_delta ngrok "
    "ngrok_authtoken ngrok_edge tokenizer_config_path disable_grammar_support max_client_batch_size "
    "lora_adapters usage_stats payload_limit enable_prefill_logprobs graceful_termination_timeout"
)


def test_every_flag_of_the_launcher_is_an_option() -> None:
    flags = {flag for option in make_command().params for flag in option.opts}
    assert {f"--{name.replace('_', '-')}" for name in LAUNCHER.split()} <= flags
    assert not {field.name for field in dataclasses.fields(Settings)} & {option.name for option in OPTIONS}


def test_flags_say_where_files_lie() -> None:
    environ: dict[str, str] = {}
    options = {
        "huggingface_hub_cache": "/cache",
        "weights_cache_override": "/weights",
        "model_id": "org/model",
    }
    apply_paths(options, environ)
    assert options == {"model_id": "/weights", "served_model_name": "org/model"}
    assert environ == {"HF_HUB_CACHE": "/cache"}


def test_a_model_named_by_flag_does_not_undo_the_override_of_its_weights() -> None:
    options = {"model_id": "org/model"}
    apply_paths(options, {"WEIGHTS_CACHE_OVERRIDE": "/weights", "MODEL_ID": "other/model"})
    assert options == {"model_id": "/weights", "served_model_name": "org/model"}
    options = {"served_model_name": "mine"}
    apply_paths(options, {"WEIGHTS_CACHE_OVERRIDE": "/weights", "MODEL_ID": "org/model"})
    assert options == {"served_model_name": "mine", "model_id": "/weights"}


def test_an_ignored_option_gives_one_warning_without_its_value() -> None:
    assert check_options({"ngrok_authtoken": "s3cret"}, {}) == [
        "--ngrok-authtoken is ignored: there is no tunnel"
    ]
    assert check_options({}, {"CUDA_GRAPHS": "1,2"}) == ["CUDA_GRAPHS is ignored: the engine chooses"]


def test_values_that_ask_for_nothing_pass_in_silence() -> None:
    environ = {
        "SHARDED": "false", "TRUST_REMOTE_CODE": "false", "USAGE_STATS": "off",
        "QUANTIZE": "", "SPECULATE": "0",
    }  # fmt: skip
    assert check_options({}, environ) == []


def test_a_flag_wins_over_the_environment() -> None:
    assert check_options({"sharded": "false"}, {"SHARDED": "true"}) == []
    with pytest.raises(InvalidRequest, match="--sharded=true"):
        check_options({"sharded": "true"}, {"SHARDED": "false"})


def test_sharded_means_that_there_are_several_as_tgi_s_launcher_has_it() -> None:
    assert check_options({"sharded": "true"}, {}, num_shard=2) == []
    assert check_options({"sharded": "false"}, {}, num_shard=2) == []
    with pytest.raises(InvalidRequest, match="--num-shard N, at least 2"):
        check_options({"sharded": "true"}, {}, num_shard=1)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.is_refused], ids=lambda o: o.name)
def test_what_would_silently_be_missing_is_refused(option: CompatOption) -> None:
    value = {"sharded": "true"}.get(option.name, "x")
    with pytest.raises(InvalidRequest, match=option.variable):
        check_options({}, {option.variable: value})


def test_sagemaker_variables_become_ours() -> None:
    environ = {
        "HF_MODEL_ID": "org/model", "HF_MODEL_REVISION": "v2", "SM_NUM_GPUS": "1",
        "HF_MODEL_QUANTIZE": "awq", "HF_MODEL_TRUST_REMOTE_CODE": "true",
    }  # fmt: skip
    assert environment_changes(environ, ["serve"]) == {
        "MODEL_ID": "org/model", "REVISION": "v2", "NUM_SHARD": "1", "QUANTIZE": "awq",
        "TRUST_REMOTE_CODE": "true", "PORT": "8080",
    }  # fmt: skip


def test_a_machine_without_gpus_has_no_number_of_shards() -> None:
    assert environment_changes({"SM_NUM_GPUS": "0"}) == {}
    assert environment_changes({"SM_NUM_GPUS": "0", "NUM_SHARD": "2"}) == {}
    assert environment_changes({"SM_NUM_GPUS": "2"}) == {"NUM_SHARD": "2"}


def test_sagemaker_without_a_model_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="HF_MODEL_ID"):
        environment_changes({"MODEL_ID": "org/model"}, ["serve"])


def test_vertex_chooses_the_port() -> None:
    assert environment_changes({"PORT": "80", "AIP_HTTP_PORT": "8081"}) == {"PORT": "8081"}


def test_what_is_set_under_our_name_stays() -> None:
    assert (
        environment_changes(
            {"HF_MODEL_ID": "a", "MODEL_ID": "b", "HUGGING_FACE_HUB_TOKEN": "x", "HF_TOKEN": "y"}
        )
        == {}
    )


def test_hugging_face_variables_of_old_are_translated() -> None:
    assert environment_changes({"HUGGING_FACE_HUB_TOKEN": "x", "HUGGINGFACE_HUB_CACHE": "/data"}) == {
        "HF_TOKEN": "x",
        "HF_HUB_CACHE": "/data",
    }
    assert environment_changes({"HF_API_TOKEN": "x", "HF_TOKEN": "y"}) == {"HF_TOKEN": "x"}


def test_ready_weights_are_served_under_the_models_name() -> None:
    options: dict[str, str] = {}
    apply_paths(options, {"WEIGHTS_CACHE_OVERRIDE": "/weights", "MODEL_ID": "org/model"})
    assert options == {"model_id": "/weights", "served_model_name": "org/model"}


def test_one_limit_under_two_names_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="MAX_INPUT_LENGTH"):
        environment_changes({"MAX_INPUT_TOKENS": "10", "MAX_INPUT_LENGTH": "10"})
    with pytest.raises(InvalidRequest, match="--max-input-length"):
        environment_changes({}, ["--max_input_tokens", "10", "--max-input-length=10"])
    assert environment_changes({"MAX_INPUT_LENGTH": "10"}, ["--max-input-tokens", "9"]) == {}


@pytest.mark.parametrize(
    ("text", "level"),
    [("info", "info"), ("WARN", "warn"), ("trace", "debug"), ("off", "error"), ("CRITICAL", "error"),
     ("info,hyper=debug", "info"),
     ("hyper=debug", "info"), ("router=debug,warn", "warn"), ("text_generation_router=debug", "debug"),
     ("warn, text_generation_router=info,", "info"), ("loud", "loud")],
)  # fmt: skip
def test_levels_of_rust_filters_are_understood(text: str, level: str) -> None:
    assert simple_level(text) == level


@pytest.mark.parametrize(
    ("host", "options", "is_said"),
    [("tgi-service", {}, True), ("tgi-service", {"hostname": "::"}, False), ("10.0.0.3", {}, False),
     ("localhost", {}, False), (socket.gethostname(), {}, False), ("", {}, False)],
)  # fmt: skip
def test_a_hostname_variable_that_is_no_address_is_ignored_with_a_line(
    host: str, options: dict[str, str | None], is_said: bool
) -> None:
    warnings = check_options(options, {"HOSTNAME": host})
    assert any(warning.startswith("HOSTNAME is ignored") for warning in warnings) is is_said
