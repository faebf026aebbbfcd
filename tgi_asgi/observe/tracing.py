"""OpenTelemetry spans of requests, created after each has ended, off the hot path.

An observer of `app.py`, used only with `--otlp-endpoint`; imports OpenTelemetry (the `otel` extra) on
creation. A request's span continues the trace of its `traceparent` header and has one child per phase:
validation, queue, prefill, decode.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from tgi_asgi.errors import GenerationFailed, ModelLoadError
from tgi_asgi.observe.access_log import CLIENT_CLOSED
from tgi_asgi.observe.summary import ObservedRequest, RequestSummary
from tgi_asgi.settings import Settings

_CLOSE_S = 1.0  # the exporter would try an unreachable collector again for ten


class Tracing:
    """Turns a finished request into spans of `provider`, which exports them in its own thread.

    Args:
        give_up: Ends an export that takes too long when the server closes.
    """

    def __init__(self, provider: Any, give_up: Callable[[], object] = lambda: None) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._give_up = give_up
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = provider.get_tracer("tgi_asgi")

    @classmethod
    def from_settings(cls, settings: Settings) -> Tracing | None:
        """Return a tracer that exports to the configured endpoint, or None without one.

        Raises:
            ModelLoadError: if OpenTelemetry is not installed.
        """
        if settings.otlp_endpoint is None:
            return None
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ModelLoadError(
                f"--otlp-endpoint needs OpenTelemetry: pip install 'tgi-asgi[otel]' ({error.name} is missing)"
            ) from None
        provider = TracerProvider(resource=Resource.create({"service.name": settings.otlp_service_name}))
        is_plain = not settings.otlp_endpoint.startswith("https://")
        exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint, insecure=is_plain)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider, exporter.shutdown)

    def close(self) -> None:
        """Export pending spans, within `_CLOSE_S`. Blocks."""
        timer = threading.Timer(_CLOSE_S, self._give_up)
        timer.daemon = True
        timer.start()
        self._provider.shutdown()
        timer.cancel()

    def request_ended(self, request: ObservedRequest, summary: RequestSummary) -> None:
        """Create a request's spans; only POST requests, which may generate, have any."""
        if request.method != "POST":
            return
        now_s, now_ns = time.monotonic(), time.time_ns()

        def epoch_ns(at_s: float) -> int:
            return now_ns - int((now_s - at_s) * 1e9)

        parent = {
            name: value.decode("latin-1")
            for name in ("traceparent", "tracestate")
            if (value := request.header(name.encode())) is not None
        }
        status = request.status or CLIENT_CLOSED
        span = self._tracer.start_span(
            f"{request.method} {request.route.path if request.route else 'unknown route'}",
            context=self._propagator.extract(parent),
            kind=self._trace.SpanKind.SERVER,
            start_time=epoch_ns(request.started_s),
            attributes=_attributes(request, summary, status),
        )
        has_failed = isinstance(request.error, GenerationFailed)  # TGI's status for it is 424
        if status >= 500 or has_failed or (request.error is not None and request.status == 200):
            span.set_status(self._trace.StatusCode.ERROR, type(request.error).__name__)
        context = self._trace.set_span_in_context(span)
        for name, begin_s, end_s in summary.phases:
            self._tracer.start_span(name, context=context, start_time=epoch_ns(begin_s)).end(epoch_ns(end_s))
        span.end(now_ns)


def _attributes(request: ObservedRequest, summary: RequestSummary, status: int) -> dict[str, Any]:
    """Return a span's attributes, named by OpenTelemetry's conventions where these exist."""
    attributes: dict[str, Any] = {
        "http.request.method": request.method,
        "http.response.status_code": status,
        "tgi.request_id": request.request_id,
    }
    if request.route is not None:
        attributes["http.route"] = request.route.path
    info = request.context.info
    if request.channels and info is not None:
        attributes |= {
            "gen_ai.request.model": info.model_id,
            "gen_ai.usage.input_tokens": summary.prompt_tokens,
            "gen_ai.usage.output_tokens": summary.generated_tokens,
            "gen_ai.response.finish_reasons": list(summary.finishes),
            "tgi.cached_tokens": summary.cached_tokens,
        }
    return attributes
