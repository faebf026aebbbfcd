"""Spans on the wire: a test collector receives a server's OTLP export and reads it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span, Status

from tests.support.server_process import ServerProcess

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
FAILED = {"prompt": "x" * 5000, "max_tokens": 5}


class Collector(service.TraceServiceServicer):
    """Records the spans that it receives."""

    def __init__(self) -> None:
        self.received: list[ResourceSpans] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        service.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        self.received += request.resource_spans
        return messages.ExportTraceServiceResponse()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def spans(self) -> list[Span]:
        return [span for of in self.received for scope in of.scope_spans for span in scope.spans]


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.stop()


def attributes_of(holder: Any) -> dict[str, Any]:
    """Return attributes as plain values."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(item) for item in value.array_value.values]
        return getattr(value, kind)

    return {attribute.key: plain(attribute.value) for attribute in holder.attributes}


def test_a_collector_gets_each_request_with_its_parts_in_its_clients_trace(collector: Collector) -> None:
    endpoint = ("--otlp-endpoint", f"http://127.0.0.1:{collector.port}", "--otlp-service-name", "my-llm")
    with ServerProcess("tests.server.fake_server", "--model-id", "fake", *endpoint) as server:
        server.wait_until_healthy()
        body = {"prompt": "a secret", "max_tokens": 5, "temperature": 0}
        traceparent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        ok = server.post("/v1/completions", json=body, headers=traceparent)
        assert ok.status_code == 200
        assert server.post("/v1/completions", json=FAILED).status_code == 400
        server.signal()  # spans that wait for the next export are sent before the process ends
        assert server.wait() == 0
    assert {attributes_of(of.resource)["service.name"] for of in collector.received} == {"my-llm"}
    spans = collector.spans()
    [served] = [span for span in spans if span.parent_span_id.hex() == PARENT]
    assert served.trace_id.hex() == TRACE
    assert served.name == "POST /v1/completions"
    assert served.kind == Span.SPAN_KIND_SERVER
    assert served.status.code == Status.STATUS_CODE_UNSET
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "tgi.request_id": "mine",
        "gen_ai.usage.input_tokens": 8,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ["length"],
        "tgi.cached_tokens": 0,
    }
    found = attributes_of(served)
    assert {name: found[name] for name in expected} == expected
    parts = sorted((span for span in spans if span.parent_span_id == served.span_id), key=_begin)
    assert [part.name for part in parts] == ["validation", "queue", "prefill", "decode"]
    assert {part.trace_id.hex() for part in parts} == {TRACE}
    moments = [served.start_time_unix_nano, *(moment for part in parts for moment in _times(part))]
    assert moments == sorted(moments)
    assert moments[-1] <= served.end_time_unix_nano
    [refused] = [span for span in spans if not span.parent_span_id]
    assert attributes_of(refused)["http.response.status_code"] == 400
    assert refused.trace_id.hex() != TRACE
    assert b"secret" not in b"".join(of.SerializeToString() for of in collector.received)


def test_a_collector_that_is_not_there_costs_nothing_but_log_lines() -> None:
    with ServerProcess(
        "tests.server.fake_server", "--model-id", "fake", "--otlp-endpoint", "http://127.0.0.1:9"
    ) as server:
        server.wait_until_healthy()
        body = {"prompt": "hello", "max_tokens": 5}
        assert server.post("/v1/completions", json=body).status_code == 200
        server.signal()
        assert server.wait() == 0


def _begin(span: Span) -> int:
    return int(span.start_time_unix_nano)


def _times(span: Span) -> tuple[int, int]:
    return span.start_time_unix_nano, span.end_time_unix_nano
