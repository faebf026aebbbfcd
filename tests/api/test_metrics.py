"""`/metrics`: TGI's names, kinds, labels and buckets, with correct values."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.asgi import request, send
from tests.support.client import client_of, post
from tests.support.scripted_engine import ScriptedEngine, fail_with, say, scripted_app, toy_info
from tests.support.waiting import LONGEST_S
from tgi_asgi import errors
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.tgi.render import NativeRenderer
from tgi_asgi.app import App
from tgi_asgi.engine.stats import DURATION_BUCKETS, EngineStats
from tgi_asgi.errors import GenerationFailed, TgiError
from tgi_asgi.observe.metrics import FAILURES, Metrics
from tgi_asgi.observe.prometheus import Registry
from tgi_asgi.settings import Settings

# The metrics of TGI 3.3.7 from a scrape: name, kind, labels. Left out are those of draft tokens and of parts
# of a step that the project's steps do not have.
TGI = """
tgi_request_count counter
tgi_request_success counter
tgi_request_failure counter err=validation,overloaded,generation,incomplete,template,dropped
tgi_batch_inference_count counter method=prefill,decode
tgi_batch_inference_success counter method=prefill,decode
tgi_batch_inference_failure counter method=prefill,decode
tgi_queue_size gauge
tgi_batch_current_size gauge
tgi_batch_current_max_tokens gauge
tgi_request_duration histogram
tgi_request_validation_duration histogram
tgi_request_queue_duration histogram
tgi_request_inference_duration histogram
tgi_request_mean_time_per_token_duration histogram
tgi_batch_inference_duration histogram method=prefill,decode
tgi_batch_forward_duration histogram method=prefill,decode
tgi_request_input_length histogram
tgi_request_generated_tokens histogram
tgi_request_max_new_tokens histogram
tgi_batch_next_size histogram
tgi_request_skipped_tokens summary
"""


def samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def scrape(app: App) -> dict[str, float]:
    async with client_of(app) as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    return samples(response.text)


@pytest.mark.parametrize("line", TGI.strip().splitlines())
def test_tgis_metrics_have_their_names_kinds_and_labels(line: str) -> None:
    name, kind, *labels = line.split()
    text = Metrics().render().decode()
    assert f"\n# TYPE {name} {kind}\n" in f"\n{text}"
    found = samples(text)
    for label in labels:
        key, _, values = label.partition("=")
        for value in values.split(","):
            suffix = "_count" if kind in ("histogram", "summary") else ""
            assert f'{name}{suffix}{{{key}="{value}"}}' in found
    if not labels:
        assert name + ("_count" if kind in ("histogram", "summary") else "") in found


def test_no_counter_of_tgi_has_a_total_suffix() -> None:
    names = re.findall(r"# TYPE (tgi_(?:request|batch)\S*) counter", Metrics().render().decode())
    assert len(names) == 6
    assert not [name for name in names if name.endswith("_total")]


def test_duration_buckets_are_tgis() -> None:
    assert len(DURATION_BUCKETS) == 35
    assert DURATION_BUCKETS[0] == pytest.approx(0.00015)
    assert DURATION_BUCKETS[-1] == pytest.approx(0.0001 * 1.5**35)


def test_length_buckets_come_from_the_models_limits() -> None:
    metrics = Metrics()
    metrics.model_loaded(toy_info(max_input_tokens=400, max_total_tokens=1000))
    found = samples(metrics.render().decode())
    inputs = [name for name in found if name.startswith("tgi_request_input_length_bucket")]
    assert inputs[0].endswith('{le="4"}') and inputs[-2].endswith('{le="400"}')
    assert len(inputs) == 101  # a hundred bounds and +Inf
    assert 'tgi_request_generated_tokens_bucket{le="1000"}' in found
    assert 'tgi_batch_next_size_bucket{le="1024"}' in found


def test_a_histogram_counts_up_to_and_with_its_bounds() -> None:
    registry = Registry()
    histogram = registry.histogram("x", "Help.", (1.0, 2.5), a="b")
    for value in (1, 2, 2.5, 3):
        histogram.observe(value)
    assert registry.render().decode().splitlines()[2:] == [
        'x_bucket{a="b",le="1"} 1',
        'x_bucket{a="b",le="2.5"} 3',
        'x_bucket{a="b",le="+Inf"} 4',
        'x_sum{a="b"} 8.5',
        'x_count{a="b"} 4',
    ]


def test_the_exposition_ends_with_a_line_feed_and_names_each_family_once() -> None:
    registry = Registry()
    for value in ("1", "2"):
        registry.counter("x", "Help.", a=value).add(2)
    assert registry.render() == b'# HELP x Help.\n# TYPE x counter\nx{a="1"} 2\nx{a="2"} 2\n'


async def test_each_request_is_counted_once_with_its_end() -> None:
    engine = ScriptedEngine(say("a", "b"))
    app = scripted_app(engine)
    app.context.metrics.model_loaded(toy_info())
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    await post(app, "/generate", {"inputs": "hi"})
    await post(app, "/generate_stream", {"inputs": "hi"})
    await post(app, "/v1/chat/completions", chat)
    await post(app, "/v1/completions", {"prompt": ["a", "b", "c"]})
    await post(app, "/generate", {"inputs": ""})
    await post(app, "/generate", [])
    await post(app, "/tokenize", {"inputs": "x"})
    engine.script = fail_with(GenerationFailed("x"))
    await post(app, "/generate", {"inputs": "hi"})
    engine.script = fail_with(GenerationFailed("x"), say("a", "b"))
    await post(app, "/generate_stream", {"inputs": "hi"})
    engine.num_permits = 0
    await post(app, "/generate", {"inputs": "hi"})
    found = await scrape(app)
    assert found["tgi_request_count"] == 9
    assert found["tgi_request_success"] == 4
    assert found['tgi_request_failure{err="validation"}'] == 2
    assert found['tgi_request_failure{err="generation"}'] == 2
    assert found['tgi_request_failure{err="overloaded"}'] == 1
    assert found["tgi_request_duration_count"] == 4
    assert found["tgi_request_generated_tokens_sum"] == 3 + 3 + 3 + 9
    for name in ("input_length", "max_new_tokens"):
        assert found[f"tgi_request_{name}_count"] == 6  # every submitted request
    assert found["tgi_request_queue_duration_count"] == 6
    assert found["tgi_time_to_first_token_seconds_count"] == 5  # one failed before its first token, one after


async def test_waiting_counts_for_those_who_give_up_as_well() -> None:
    app = scripted_app(ScriptedEngine(say("a", finish=None)))
    call = request("POST", "/generate_stream", {"inputs": "hi", "parameters": {"max_new_tokens": 500}})
    answering = asyncio.create_task(send(app, call))
    async with asyncio.timeout(LONGEST_S):
        await call.got_frame.wait()
        call.gone.set()
        await answering
    found = await scrape(app)
    assert found['tgi_request_failure{err="dropped"}'] == 1
    assert found["tgi_request_queue_duration_count"] == found["tgi_time_to_first_token_seconds_count"] == 1
    assert found["tgi_request_duration_count"] == 0


async def test_what_breaks_after_the_response_has_begun_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    app = scripted_app(ScriptedEngine(say("a", "b")))
    with monkeypatch.context() as patch:
        patch.setattr(NativeRenderer, "_ending", lambda self, finish: 1 / 0)  # renders the last token's event
        with pytest.raises(ZeroDivisionError):  # so that the server closes the connection
            await send(app, request("POST", "/generate_stream", {"inputs": "hi"}))

    async def respond(self: Exchange, *args: Any, **options: Any) -> None:
        self.status = 200
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Exchange, "respond", respond)
        with pytest.raises(ZeroDivisionError):
            await send(app, request("POST", "/generate", {"inputs": "hi"}))
    found = await scrape(app)
    assert (found["tgi_request_count"], found["tgi_request_success"]) == (2, 0)
    assert found['tgi_request_failure{err="generation"}'] == 2


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}),
    ],
)
async def test_the_newer_chat_routes_are_counted_as_well(path: str, body: dict[str, Any]) -> None:
    app = scripted_app(ScriptedEngine(say("a")))
    await post(app, path, body)
    found = await scrape(app)
    assert found["tgi_request_count"] == found["tgi_request_success"] == 1


def test_every_error_has_a_label_that_is_exposed() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TgiError)]
    assert len(kinds) > 10
    assert {kind.failure for kind in kinds} < set(FAILURES)


async def test_a_request_without_a_template_is_a_template_failure() -> None:
    app = scripted_app(ScriptedEngine(), chat_template=None)
    await post(app, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    assert (await scrape(app))['tgi_request_failure{err="template"}'] == 1


async def test_requests_while_loading_are_counted_apart() -> None:
    app = scripted_app(ScriptedEngine())
    app.context.served = None
    await post(app, "/generate", {"inputs": "hi"})
    found = await scrape(app)
    assert found['tgi_request_failure{err="unavailable"}'] == 1
    assert found["tgi_queue_size"] == 0


VLLM = """
num_requests_running gauge
num_requests_waiting gauge
kv_cache_usage_perc gauge
prefix_cache_queries counter
prefix_cache_hits counter
num_preemptions counter
prompt_tokens counter
generation_tokens counter
request_success counter finished_reason=stop,length,abort
time_to_first_token_seconds histogram
inter_token_latency_seconds histogram
e2e_request_latency_seconds histogram
request_queue_time_seconds histogram
request_inference_time_seconds histogram
request_prefill_time_seconds histogram
request_decode_time_seconds histogram
request_prompt_tokens histogram
request_generation_tokens histogram
request_max_num_generation_tokens histogram
spec_decode_num_drafts counter
spec_decode_num_draft_tokens counter
spec_decode_num_accepted_tokens counter
"""


def families(text: bytes) -> dict[str, Metric]:
    """Parse an exposition with Prometheus' own library, which drops counters' `_total`."""
    found = list(text_string_to_metric_families(text.decode()))
    assert len({family.name for family in found}) == len(found)
    return {family.name: family for family in found}


@pytest.fixture(scope="module")
def of_a_new_server() -> dict[str, Metric]:
    metrics = Metrics()
    metrics.model_loaded(toy_info())
    return families(metrics.render())


@pytest.mark.parametrize("line", VLLM.strip().splitlines())
def test_vllms_dashboards_find_their_series(of_a_new_server: dict[str, Metric], line: str) -> None:
    name, kind, *labels = line.split()
    family = of_a_new_server[f"vllm:{name}"]
    assert family.type == kind
    suffix = {"gauge": "", "counter": "_total", "histogram": "_bucket"}[kind]
    shown = [sample.labels for sample in family.samples if sample.name == f"vllm:{name}{suffix}"]
    assert shown
    assert all((of["model_name"], of["engine"]) == ("toy/model", "0") for of in shown)
    for label in labels:
        key, _, values = label.partition("=")
        assert [of[key] for of in shown] == values.split(",")
    if kind == "histogram":
        assert shown[-1]["le"] == "+Inf"
        counted = {sample.name for sample in family.samples}
        assert {f"vllm:{name}_sum", f"vllm:{name}_count"} <= counted


def test_a_models_name_cannot_break_out_of_its_label() -> None:
    name = 'a\\b"} 1\nforged{x="\n\\n'
    metrics = Metrics()
    metrics.model_loaded(toy_info(model_id=name))
    found = families(metrics.render())
    assert "forged" not in found
    assert found["vllm:num_requests_running"].samples[0].labels["model_name"] == name


async def test_choices_are_counted_by_their_ends_under_vllms_name() -> None:
    engine = ScriptedEngine(say("a", "b"))
    app = scripted_app(engine)
    app.context.metrics.model_loaded(toy_info())
    await post(app, "/v1/completions", {"prompt": ["x", "y"], "n": 2})
    await post(app, "/v1/completions", {"prompt": "x", "max_tokens": 1})
    engine.script = fail_with(GenerationFailed("x"), say("a", "b"))
    await post(app, "/v1/completions", {"prompt": "x", "n": 3})
    found = families(app.context.metrics.render())
    ends = {of.labels["finished_reason"]: of.value for of in found["vllm:request_success"].samples}
    assert ends == {"stop": 4, "length": 1, "abort": 3}
    counts = {of.name: of.value for of in found["vllm:e2e_request_latency_seconds"].samples}
    assert counts["vllm:e2e_request_latency_seconds_count"] == 2


async def test_the_times_of_prefill_and_decode_add_up_to_that_of_inference() -> None:
    engine = ScriptedEngine(say("a", "b"))
    app = scripted_app(engine)
    await post(app, "/generate", {"inputs": "hi"})
    engine.script = fail_with(GenerationFailed("x"), say("a", "b"))
    await post(app, "/generate", {"inputs": "hi"})
    found = await scrape(app)
    parts = [f"tgi_request_{phase}_duration" for phase in ("prefill", "decode")]
    assert [found[f"{name}_count"] for name in parts] == [1, 1]
    sums = [found[f"{name}_sum"] for name in (*parts, "tgi_request_inference_duration")]
    assert sums[0] + sums[1] == pytest.approx(sums[2])


async def test_usage_is_counted_by_key() -> None:
    engine = ScriptedEngine(say("a", "b"))
    app = scripted_app(engine, Settings(api_key=("one", "two")))
    async with client_of(app) as client:
        for key, prompt in (("one", "four"), ("two", "hi"), ("two", ""), ("three", "x")):
            body = {"inputs": prompt, "parameters": {"max_new_tokens": 2}}
            await client.post("/generate", json=body, headers={"authorization": f"Bearer {key}"})
    found = families(app.context.metrics.render())
    used = {
        name: {sample.labels["key"]: sample.value for sample in found[f"tgi_key_{name}"].samples}
        for name in ("requests", "prompt_tokens", "generated_tokens")
    }
    assert used == {
        "requests": {"key 1": 1, "key 2": 2},
        "prompt_tokens": {"key 1": 4, "key 2": 2},
        "generated_tokens": {"key 1": 2, "key 2": 2},
    }


def test_the_engines_numbers_are_read_as_they_are() -> None:
    stats = EngineStats()
    stats.waiting, stats.running, stats.preemptions = 3, 2, 1
    stats.blocks_used, stats.blocks_total = 5, 20
    stats.compute_threads = 3
    stats.sampled_tokens, stats.prefill_tokens, stats.prefix_hit_tokens = 70, 30, 12
    stats.failed_steps = 1
    stats.step_s["decode"].observe(0.02)
    stats.inter_token_s.observe(0.02, times=8)
    stats.skipped_tokens.observe(3, times=2)
    found = samples(Metrics(block_size=16).render(stats).decode())
    assert (found["tgi_queue_size"], found["tgi_requests_waiting"]) == (3, 3)
    assert (found["tgi_batch_current_size"], found["tgi_requests_running"]) == (2, 2)
    assert found["tgi_batch_current_max_tokens"] == 80
    assert found["tgi_kv_cache_usage_ratio"] == 0.25
    assert found["tgi_compute_threads"] == 3
    assert found["tgi_preemptions_total"] == 1
    assert found["tgi_generation_tokens_total"] == 70
    assert found["tgi_prompt_tokens_total"] == 42
    assert found["tgi_prefix_cache_hit_tokens_total"] == 12
    assert found['tgi_batch_inference_success{method="decode"}'] == 1
    assert found['tgi_batch_inference_count{method="decode"}'] == 2
    assert found['tgi_batch_inference_failure{method="decode"}'] == 1
    assert found["tgi_inter_token_latency_seconds_count"] == 8
    assert found['tgi_batch_inference_duration_sum{method="decode"}'] == 0.02
    skipped = {name: value for name, value in found.items() if "skipped_tokens" in name}
    assert skipped == {"tgi_request_skipped_tokens_sum": 6, "tgi_request_skipped_tokens_count": 2}
    bounds = [name for name in found if name.startswith('tgi_batch_forward_duration_bucket{method="decode"')]
    assert len(bounds) == 36  # the engine uses TGI's bounds too
