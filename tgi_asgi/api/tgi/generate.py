"""TGI's generating routes: `POST /`, `/generate` and `/generate_stream`."""

from __future__ import annotations

from tgi_asgi.api.call import Call
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.parse import decode_json
from tgi_asgi.api.tgi.render import NativeRenderer
from tgi_asgi.api.tgi.schema import COMPAT_GENERATE, GENERATE
from tgi_asgi.api.tgi.validation import read_request


def parse_generate(body: bytes, exchange: Exchange) -> Call:
    """Read the body of `/generate`."""
    request = decode_json(body, GENERATE)
    job, shown = read_request(request, exchange.context, is_stream=False)
    return Call(jobs=[job], render=lambda generation: NativeRenderer(generation, shown))


def parse_generate_stream(body: bytes, exchange: Exchange) -> Call:
    """Read the body of `/generate_stream`."""
    request = decode_json(body, GENERATE)
    job, shown = read_request(request, exchange.context, is_stream=True)
    return Call(jobs=[job], render=lambda generation: NativeRenderer(generation, shown), stream=True)


def parse_root(body: bytes, exchange: Exchange) -> Call:
    """Read the body of `POST /`, which says itself whether to stream; answers begin with the prompt."""
    request = decode_json(body, COMPAT_GENERATE)
    is_stream = bool(request.stream)
    job, shown = read_request(request, exchange.context, is_stream=is_stream, full_text=True)
    return Call(
        jobs=[job],
        render=lambda generation: NativeRenderer(generation, shown, is_list=True),
        stream=is_stream,
    )
