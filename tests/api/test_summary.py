"""Sizes and times of a request: read anew while it runs, and once after its end."""

from __future__ import annotations

import time

from tests.support.asgi import request
from tests.support.scripted_engine import ScriptedEngine, scripted_app
from tgi_asgi.api.errors import NATIVE
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.observe.summary import RequestSummary
from tgi_asgi.types import FinishReason, GenerationRequest, RequestStats, SamplingParams, StopConditions


class Channel:
    """A channel whose numbers the test writes."""

    def __init__(self) -> None:
        self.request = GenerationRequest("id", [1, 2, 3], SamplingParams(), StopConditions(max_tokens=5))
        self.stats = RequestStats(arrival_s=time.monotonic())


def test_numbers_are_kept_once_all_channels_have_ended_and_no_earlier() -> None:
    call = request("POST", "/v1/completions", b"{}")
    app = scripted_app(ScriptedEngine())
    exchange = Exchange(app.context, call.scope, call.receive, call.send, NATIVE)
    channels = Channel(), Channel()
    exchange.channels += channels  # type: ignore[arg-type]
    for number, channel in enumerate(channels):
        channel.stats.generated_tokens, channel.stats.finishes = 1, [FinishReason.LENGTH]
        assert RequestSummary.of(exchange).generated_tokens == 2 * number + 1
        assert exchange.summary is None
        channel.stats.generated_tokens, channel.stats.finished_s = 2, time.monotonic()
    first = RequestSummary.of(exchange)
    assert (first.generated_tokens, first.prompt_tokens, first.finishes) == (4, 6, ("length", "length"))
    exchange.channels.clear()
    time.sleep(0.01)
    last = RequestSummary.of(exchange)
    assert last.total_s >= first.total_s + 0.01
    assert (last.generated_tokens, last.inference_s) == (4, first.inference_s)
    app.context.close()
