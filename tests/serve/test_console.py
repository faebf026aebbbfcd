"""Start-up output: progress, the summary, and a curl line that works."""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import replace

import pytest

from tgi_asgi.model_info import Activation, Classification, ModelInfo, Scoring
from tgi_asgi.serve.console import Console, describe, example
from tgi_asgi.settings import MIB, Settings
from tgi_asgi.types import Pooling, PoolingKind

INFO = ModelInfo(
    model_id="org/name",
    revision="0123456789abcdef0123",
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    device="cpu",
    vocab_size=10,
    max_input_tokens=8191,
    max_total_tokens=8192,
    eos_token_ids=frozenset({2}),
    kv_tokens=65536,
    kv_bytes=3 << 29,
    num_threads=2,
)


def test_the_summary_has_what_a_person_wants_to_know() -> None:
    assert describe(INFO, "http://127.0.0.1:3000", 1.96).splitlines() == [
        "Model         org/name (0123456789ab)",
        "Architecture  LlamaForCausalLM",
        "Arithmetic    bfloat16 on cpu, 2 threads",
        "Context       8,192 tokens",
        "KV cache      65,536 tokens, 1.5 GiB",
        "Ready         http://127.0.0.1:3000 after 2.0 s",
    ]


def test_the_summary_says_in_how_many_shards() -> None:
    text = describe(replace(INFO, num_shards=2), "http://h:1", 1)
    assert "Arithmetic    bfloat16 on cpu, 2 shards with 2 threads each" in text


def test_the_summary_says_how_prompts_are_computed_where_that_is_otherwise() -> None:
    text = describe(replace(INFO, kernel_set="amx", prompt_precision="bfloat16"), "http://h:1", 1)
    assert "Arithmetic    bfloat16 on cpu (amx), prompts in bfloat16, 2 threads" in text


def test_the_example_fits_the_model_and_the_keys() -> None:
    assert "/v1/chat/completions" in example(INFO, "http://h:1", has_chat=True, has_key=False)
    assert "/generate" in example(INFO, "http://h:1", has_chat=False, has_key=False)
    assert "Bearer $API_KEY" in example(INFO, "http://h:1", has_chat=True, has_key=True)
    embeds = replace(INFO, generates=False)
    assert "/v1/embeddings" in example(embeds, "http://h:1", has_chat=True, has_key=False)
    scores = replace(embeds, scoring=Scoring(Pooling(PoolingKind.LOGITS, (0,)), 512))
    classes = replace(
        embeds,
        classification=Classification(
            Pooling(PoolingKind.LOGITS, (0, 1)), 512, ("a", "b"), Activation.SOFTMAX
        ),
    )
    assert "/predict" in example(classes, "http://h:1", has_chat=False, has_key=False)
    assert "/rerank" in example(scores, "http://h:1", has_chat=False, has_key=False)


def test_the_example_works_on_a_socket_whatever_its_path() -> None:
    command = example(INFO, "unix:/run/a b/s", has_chat=True, has_key=False)
    assert shlex.split(command)[1:4] == [
        "--unix-socket", "/run/a b/s", "http://localhost/v1/chat/completions",
    ]  # fmt: skip
    assert " https://localhost/" in example(INFO, "unix:/s", has_chat=True, has_key=False, is_tls=True)


def test_a_model_that_keeps_nothing_has_no_cache_to_tell_of() -> None:
    assert "KV cache" not in describe(replace(INFO, kv_bytes=0), "http://h:1", 1)


def test_the_example_has_the_key_where_keys_come_from_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Console(Settings(api_key_file="keys")).summarise(INFO, "http://h:1", has_chat=True)
    assert "Bearer $API_KEY" in capsys.readouterr().out


def test_without_a_terminal_a_stage_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    console = Console(Settings())
    with caplog.at_level(logging.INFO, "tgi_asgi"):
        console.report("downloading", 0, 10 * MIB)
        for done in range(10):
            console.report("downloading", done * MIB, 10 * MIB)
        console.report("loading libraries", 0, None)
    assert [record.message for record in caplog.records] == ["downloading: 0 of 10 MiB", "loading libraries"]


def test_on_a_terminal_a_stage_is_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    console = Console(Settings())
    console.report("downloading", 0, 10 * MIB)
    console.report("downloading", 10 * MIB, 10 * MIB)
    console.report("loading libraries", 0, None)
    console.close()
    text = capsys.readouterr().err
    assert "downloading:   0%" in text
    assert "downloading: 100%" in text
    assert "loading libraries" in text


def test_with_json_logs_the_summary_is_a_record(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "tgi_asgi"):
        Console(Settings(json_output=True)).summarise(INFO, "http://h:1", has_chat=True)
    assert capsys.readouterr().out == ""
    assert caplog.records[-1].__dict__["model"] == "org/name"
