"""Settings: the environment's spellings, ranges, and the values that a repr must not show."""

from __future__ import annotations

import dataclasses
import math
import re
import socket
from typing import Any

import pytest

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import GivenRope, Settings
from tgi_asgi.settings.speculation import Speculation


def test_every_field_is_read_from_its_upper_snake_variable() -> None:
    examples = {"int": "3", "float": "2.5", "bool": "true", "str": "text", "tuple": "one"}
    special = {
        "block_size": "32", "dtype": "float32", "log_level": "warn", "max_total_tokens": "4",
        "hostname": "10.0.0.3", "cuda_memory_fraction": "0.4",
        "cors_allow_origin": "*", "aip_predict_route": "/predict", "aip_health_route": "/healthy",
        "tool_format": "mistral", "reasoning_format": "think", "kv_cache_dtype": "int8", "pooling": "mean",
        "quantize": "q8_0", "model_impl": "native", "rope_scaling": "yarn", "prompt_precision": "bfloat16",
        "prompt_attention": "sdpa",
        "speculative_config": '{"method": "ngram", "num_speculative_tokens": 2}',
        "sampling_defaults": "openai", "override_generation_config": '{"top_k": 20}',
        "default_chat_template_kwargs": '{"enable_thinking": false}',
    }  # fmt: skip
    for spec in dataclasses.fields(Settings):
        if spec.name in ("ssl_keyfile", "requests_per_minute"):
            continue  # they need the other TLS file, and keys
        kind = next(name for name in examples if str(spec.type).startswith(name))
        text = special.get(spec.name, examples[kind])
        value = getattr(Settings.from_environ({spec.name.upper(): text}), spec.name)
        assert value != spec.default or spec.default is True, spec.name
        assert isinstance(value, {"int": int, "float": float, "bool": bool, "str": str, "tuple": tuple}[kind])


def test_an_empty_variable_is_unset() -> None:
    assert Settings.from_environ({"PORT": "", "MODEL_ID": ""}) == Settings()


def test_given_values_win_and_their_variables_are_not_read() -> None:
    assert Settings.from_environ({"PORT": "no number"}, port=8080).port == 8080


def test_tgi_s_old_name_of_a_variable_is_read_after_the_new_one() -> None:
    assert Settings.from_environ({"MAX_INPUT_LENGTH": "7"}).max_input_tokens == 7
    both = {"MAX_INPUT_LENGTH": "7", "MAX_INPUT_TOKENS": "8"}
    assert Settings.from_environ(both).max_input_tokens == 8


@pytest.mark.parametrize("text", ["true", "1", "yes", "on", "TRUE"])
def test_switches_are_turned_on_by_the_usual_words(text: str) -> None:
    assert Settings.from_environ({"JSON_OUTPUT": text}).json_output


@pytest.mark.parametrize("text", ["false", "0", "no", "off", "False"])
def test_switches_are_turned_off_by_the_usual_words(text: str) -> None:
    assert not Settings.from_environ({"PREFIX_CACHE": text}).prefix_cache


@pytest.mark.parametrize(("variable", "text"), [("PORT", "x"), ("JSON_OUTPUT", "maybe"), ("PORT", "80.5")])
def test_a_variable_that_does_not_parse_is_named(variable: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{variable}='{text}'"):
        Settings.from_environ({variable: text})


def test_a_variable_that_does_not_parse_is_shown_in_part() -> None:
    with pytest.raises(InvalidRequest, match="PORT='9999") as refused:
        Settings.from_environ({"PORT": "9" * 5000})
    assert len(refused.value.message) < 300


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 65536}, "--port must be in"),
        ({"max_batch_size": 0}, "--max-batch-size must be in 1..65536"),
        ({"max_batch_size": 10**6}, "--max-batch-size must be in 1..65536"),
        ({"num_threads": 1025}, "--num-threads must be in 1..1024"),
        ({"max_batch_prefill_tokens": 10**12}, "--max-batch-prefill-tokens must be in 1..1048576"),
        ({"max_concurrent_requests": 10**30}, "--max-concurrent-requests must be at most 9007199254740991"),
        ({"validation_workers": 0}, "--validation-workers must be in 1..1024"),
        ({"validation_workers": 2**32}, "--validation-workers must be in 1..1024"),
        ({"max_stop_sequences": -1}, "--max-stop-sequences must not be negative"),
        ({"reasoning_budget": -2}, "--reasoning-budget must be at least -1"),
        ({"block_size": 17}, "--block-size must be 16, 32 or 64"),
        ({"dtype": "int4"}, "--dtype must be one of auto, float32"),
        ({"max_input_tokens": 10, "max_total_tokens": 10}, "--max-input-tokens must be below"),
        ({"max_total_tokens": 1}, "--max-total-tokens must be at least 2"),
        ({"api_key": ("a", "b\udcff")}, "--api-key must be printable UTF-8, got one that is not"),
        ({"admin_api_key": "b\udcff"}, "--admin-api-key must be printable UTF-8, got one that is not"),
        ({"drain_delay_s": -1.0}, "--drain-delay-s must be in 0..86400"),
        ({"drain_delay_s": math.inf}, "--drain-delay-s must be in 0..86400"),
        ({"max_image_pixels": 0}, "--max-image-pixels must be in 1..89478485"),
        ({"max_image_pixels": 10**8}, "--max-image-pixels must be in 1..89478485"),
        ({"allowed_media_domains": ("https://a.example",)}, "--allowed-media-domains must be host names"),
        ({"allowed_media_domains": ("a.example", " ,")}, "--allowed-media-domains must be host names"),
        ({"allowed_media_domains": ("a.example b.example",)}, "--allowed-media-domains must be host names"),
        ({"max_body_memory": 0}, "--max-body-memory must be at least 1"),
        ({"max_answer_memory": 0}, "--max-answer-memory must be at least 1"),
        ({"hostname": " "}, "--hostname must not be empty"),
        ({"uds": ""}, "--uds must not be empty"),
        ({"otlp_endpoint": ""}, "--otlp-endpoint must be printable, and not be empty"),
        ({"otlp_endpoint": "http://a\udcff"}, "--otlp-endpoint must be printable"),
        ({"otlp_service_name": "a\udcff"}, "--otlp-service-name must be printable"),
        ({"cors_allow_origin": ("https://a.example", "b.example")}, "--cors-allow-origin must be"),
        ({"cors_allow_origin": ("https://a.example/chat",)}, "--cors-allow-origin must be"),
        ({"cors_allow_origin": ("https://\udcff",)}, "--cors-allow-origin must be"),
        ({"cors_allow_origin": ("https://*.example",)}, "--cors-allow-origin must be"),
        ({"cors_allow_origin": ("https://a.example,b.example",)}, "--cors-allow-origin must be"),
        ({"aip_predict_route": "predict"}, "--aip-predict-route must be a path"),
        ({"aip_predict_route": "//"}, "--aip-predict-route must be a path"),
        ({"aip_health_route": "/a?b"}, "--aip-health-route must be a path"),
        ({"aip_health_route": "/{x}"}, "--aip-health-route must be a path"),
        ({"requests_per_minute": 5}, "--requests-per-minute needs --api-key or --api-key-file"),
        ({"compute_type": "a\nb"}, "--compute-type must be printable"),
        ({"served_model_name": "a\nb"}, "--served-model-name must be printable"),
        ({"quantize": "q80"}, "--quantize must be q8_0 or q4_0"),
        ({"ssl_keyfile": "key.pem"}, "--ssl-keyfile needs --ssl-certfile"),
        ({"step_timeout_s": 1e-7}, "--step-timeout-s must be at least 0.001"),
        ({"target_inter_token_ms": 0.0}, "--target-inter-token-ms must be positive"),
    ],
)
def test_values_out_of_range_name_the_flag(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Settings(**values)  # type: ignore[arg-type]


def test_the_bounds_themselves_are_allowed() -> None:
    least: dict[str, Any] = {
        "port": 0, "max_batch_size": 1, "max_total_tokens": 2, "reasoning_budget": -1, "max_lora_rank": 1,
        "max_stop_sequences": 0, "step_timeout_s": 0.001, "thread_nice": 0, "rope_factor": 1.0,
        "num_threads": 1,
    }  # fmt: skip
    most: dict[str, Any] = {
        "port": 65535, "max_batch_size": 65536, "max_batch_prefill_tokens": 1 << 20, "max_lora_rank": 512,
        "drain_delay_s": 86400.0, "cuda_memory_fraction": 1.0, "thread_nice": 19, "rope_factor": 1000.0,
        "num_threads": 1024, "speculate": 64, "max_image_pixels": 89_478_485,
    }  # fmt: skip
    for values in (least, most):
        assert {name: getattr(Settings(**values), name) for name in values} == values


def test_a_variable_that_only_names_the_machine_does_not_say_where_to_listen() -> None:
    """Docker and shells set HOSTNAME for every process; as in TGI, only an address says where to listen."""
    for name in (socket.gethostname(), "tgi-service", "10.0.0"):
        assert Settings.from_environ({"HOSTNAME": name}) == Settings()
    for address in ("10.0.0.3", "::", "localhost"):
        assert Settings.from_environ({"HOSTNAME": address}).hostname == address
    assert Settings.from_environ({}, hostname=socket.gethostname()).hostname == socket.gethostname()


def test_keys_lose_what_files_and_shells_add_to_their_ends() -> None:
    settings = Settings.from_environ({"ADMIN_API_KEY": " root\n"}, api_key=("one\n", " two"))
    assert (settings.api_key, settings.admin_api_key) == (("one", "two"), "root")


@pytest.mark.parametrize("name", ["api_key", "admin_api_key"])
@pytest.mark.parametrize(
    ("key", "message"), [("", "be empty"), (" \n", "be empty"), ("top\nsecret", "contain whitespace")]
)
def test_a_key_that_nobody_or_everybody_could_send_is_refused(name: str, key: str, message: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(InvalidRequest, match=f"^{flag} must not {message}") as caught:
        Settings.from_environ({}, **{name: (key,) if name == "api_key" else key})
    assert "secret" not in caught.value.message


def test_the_repr_shows_what_was_changed_and_no_key() -> None:
    text = repr(Settings(port=8080, api_key=("very-secret",), admin_api_key="secret-too"))
    assert "port=8080" in text
    assert "secret" not in text
    assert "max_batch_size" not in text


def test_speculation_is_given_in_tgis_way_or_in_vllms() -> None:
    assert Settings().speculation is None
    assert Settings.from_environ({"SPECULATE": "5"}).speculation == Speculation(5)
    config = (
        '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 3, "prompt_lookup_max": 9}'
    )
    assert Settings(speculative_config=config).speculation == Speculation(4, 3, 9)
    given = '{"method": "ngram", "num_speculative_tokens": 4, '
    assert Settings(speculative_config=given + '"prompt_lookup_max": 1}').speculation == Speculation(4, 1, 1)
    assert Settings(speculative_config=given + '"prompt_lookup_min": 33}').speculation == Speculation(
        4, 33, 33
    )
    named = Settings(speculative_config='{"model": "[ngram]", "num_speculative_tokens": 4}')
    assert named.speculation == Speculation(4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "be JSON"),
        ("[]", "be an object"),
        ('{"num_speculative_tokens": 4}', "draft models are not supported"),
        ('{"method": "eagle", "model": "x", "num_speculative_tokens": 4}', "'eagle'"),
        ('{"method": "ngram", "model": "some/draft", "num_speculative_tokens": 4}', "no draft model"),
        ('{"method": "ngram"}', "num_speculative_tokens"),
        ('{"method": "ngram", "num_speculative_tokens": 65}', "1..64, got 65"),
        ('{"method": "ngram", "num_speculative_tokens": true}', "got True"),
        (
            '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 9, '
            '"prompt_lookup_max": 8}',
            "prompt_lookup_max",
        ),
        ('{"method": "ngram", "num_speculative_tokens": 4, "quantization": "fp8"}', "'quantization'"),
    ],
)
def test_what_is_not_speculated_is_refused_by_name(config: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Settings(speculative_config=config)


@pytest.mark.parametrize(
    "config", ["[" * 100_000, '{"method": ' + "[" * 100_000, '["' + "x" * 10_000 + '"]', "x" * 10_000]
)
def test_what_is_no_object_is_refused_in_few_words(config: str) -> None:
    with pytest.raises(InvalidRequest, match="--speculative-config must be") as refused:
        Settings(speculative_config=config)
    assert len(refused.value.message) < 400


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("override_generation_config", "{", "be JSON"),
        ("override_generation_config", "[]", "be an object"),
        (
            "override_generation_config", '{"temprature": 1}',
            "have temperature, top_k, top_p, min_p, typical_p, repetition_penalty only",
        ),
        ("override_generation_config", '{"temperature": -1}', "have temperature in 0..100, got -1"),
        (
            "override_generation_config", '{"top_k": 0.5}',
            "have top_k as an integer in -1..2147483647, got 0.5",
        ),
        ("override_generation_config", '{"top_p": "0.9"}', "have top_p in 0..1, got '0.9'"),
        ("default_chat_template_kwargs", "{", "be JSON"),
        ("default_chat_template_kwargs", "5", "be an object"),
        (
            "default_chat_template_kwargs", '{"a": 1, "messages": []}',
            "only have variables of the model's, got 'messages'",
        ),
    ],
)  # fmt: skip
def test_an_object_with_wrong_fields_is_refused_by_name(name: str, value: str, message: str) -> None:
    flag = name.replace("_", "-")
    with pytest.raises(InvalidRequest, match=f"^--{flag} must {re.escape(message)}"):
        Settings(**{name: value})  # type: ignore[arg-type]


def test_speculation_is_not_given_twice() -> None:
    with pytest.raises(InvalidRequest, match="combined with --speculative-config"):
        Settings(speculate=3, speculative_config='{"method": "ngram", "num_speculative_tokens": 4}')


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"rope_factor": 1.0}, None),
        ({"rope_factor": 2.0}, GivenRope("linear", 2.0)),
        ({"rope_scaling": "dynamic"}, GivenRope("dynamic", 1.0)),
        ({"rope_scaling": "yarn", "rope_factor": 4.0}, GivenRope("yarn", 4.0)),
        ({"rope_scaling": "none", "rope_factor": 4.0}, GivenRope("none", 1.0)),
    ],
)
def test_positions_are_scaled_as_tgi_reads_its_two_options(given: Any, expected: GivenRope | None) -> None:
    assert Settings(**given).given_rope == expected


@pytest.mark.parametrize("given", [{"rope_scaling": "ntk"}, {"rope_factor": 0.5}, {"rope_factor": math.nan}])
def test_a_scaling_of_positions_that_there_is_not_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequest, match="--rope-"):
        Settings(**given)
