"""Spans of requests: one per request, in its client's trace, with child spans nested and in order."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, fail_with, say, scripted_app
from tgi_asgi.app import create_app
from tgi_asgi.errors import GenerationFailed, ModelLoadError
from tgi_asgi.observe import tracing
from tgi_asgi.observe.tracing import Tracing
from tgi_asgi.settings import Settings

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


async def spans_of(engine: ScriptedEngine, body: dict[str, object], **headers: str) -> list[ReadableSpan]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = scripted_app(engine)
    app.observers.append(Tracing(provider).request_ended)
    async with client_of(app) as client:
        await client.post("/generate", json=body, headers=headers)
        await client.get("/health")
    return list(exporter.get_finished_spans())


async def test_a_request_has_a_span_in_its_clients_trace_and_its_parts_lie_within() -> None:
    *parts, request = await spans_of(
        ScriptedEngine(say("a", "b")), {"inputs": "secret"}, traceparent=f"00-{TRACE}-{PARENT}-01"
    )
    assert request.name == "POST /generate"
    assert f"{request.context.trace_id:032x}" == TRACE
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.attributes is not None
    assert request.attributes["gen_ai.usage.input_tokens"] == 6
    assert request.attributes["gen_ai.usage.output_tokens"] == 3
    assert request.attributes["http.response.status_code"] == 200
    assert request.status.is_ok or request.status.is_unset
    assert [part.name for part in parts] == ["validation", "queue", "prefill", "decode"]
    at = request.start_time
    for part in parts:
        assert part.parent is not None
        assert part.parent.span_id == request.context.span_id
        assert part.start_time is not None
        assert part.end_time is not None
        assert at is not None
        assert at <= part.start_time <= part.end_time
        at = part.end_time
    assert request.end_time is not None
    assert at is not None
    assert at <= request.end_time
    assert "secret" not in request.to_json()


async def test_a_failure_is_an_error_span_and_a_refusal_is_none() -> None:
    """Also where TGI's status for it, 424, is not one of a server's failures."""
    *_, failed = await spans_of(ScriptedEngine(fail_with(GenerationFailed("why"))), {"inputs": "x"})
    assert failed.attributes is not None
    assert failed.attributes["http.response.status_code"] == 424
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "GenerationFailed")
    [refused] = await spans_of(ScriptedEngine(), {"inputs": ""}, traceparent="garbage")
    assert refused.status.is_unset
    assert refused.parent is None


def test_without_the_library_the_server_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ModelLoadError, match=r"tgi-asgi\[otel\]"):
        create_app(Settings(model_id="m", otlp_endpoint="http://localhost:4317"))


def test_an_export_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_CLOSE_S", 0.01)
    given_up, ends = threading.Event(), []

    class Unreachable(InMemorySpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            ends.append(given_up.wait(5))
            return SpanExportResult.FAILURE

        def shutdown(self) -> None:
            given_up.set()

    exporter, provider = Unreachable(), TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    provider.get_tracer("test").start_span("request").end()
    Tracing(provider, exporter.shutdown).close()
    assert ends == [True]
