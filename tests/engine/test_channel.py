from __future__ import annotations

from collections.abc import Sequence

from tests.engine.helpers import make_request
from tgi_asgi.engine.admission import Admission
from tgi_asgi.engine.channel import RequestChannel
from tgi_asgi.errors import GenerationFailed, TgiError
from tgi_asgi.types import FinishReason, TokenEvent


class Recorder:
    def __init__(self) -> None:
        self.seen: list[object] = []

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        self.seen.append([event.token_id for event in events])

    def on_error(self, error: TgiError) -> None:
        self.seen.append(error)


def make_channel(n: int = 1) -> tuple[RequestChannel, list[RequestChannel]]:
    cancelled: list[RequestChannel] = []
    permit = Admission(8, lambda: 0.0).acquire(n)
    return RequestChannel(make_request(5, n=n), permit, cancelled.append, 0.0), cancelled


def event(token_id: int, index: int = 0, *, is_last: bool = False) -> TokenEvent:
    return TokenEvent(index, token_id, finish=FinishReason.LENGTH if is_last else None)


def test_it_ends_when_every_choice_has_ended() -> None:
    channel, _ = make_channel(n=2)
    channel.push(event(1, 0, is_last=True))
    assert not channel.is_ended
    channel.push(event(1, 1, is_last=True))
    assert channel.is_ended


def test_a_sink_gets_what_waited_then_each_flush_once() -> None:
    channel, _ = make_channel()
    channel.push(event(1))
    channel.flush()
    sink = Recorder()
    channel.attach(sink)
    channel.push(event(2))
    channel.push(event(3))
    channel.flush()
    channel.flush()
    error = GenerationFailed("broken")
    channel.fail(error)
    channel.fail(GenerationFailed("again"))
    channel.flush()
    assert sink.seen == [[1], [2, 3], error]


def test_a_sink_that_raises_still_gets_the_error() -> None:
    class Broken(Recorder):
        def on_events(self, events: Sequence[TokenEvent]) -> None:
            raise ValueError("broken")

    channel, cancelled = make_channel()
    sink = Broken()
    channel.attach(sink)
    channel.push(event(1))
    error = GenerationFailed("broken")
    channel.fail(error)
    channel.flush()
    assert (sink.seen, cancelled) == ([error], [])  # nothing is left to cancel


def test_an_error_before_a_sink_was_attached_is_not_lost_and_comes_last() -> None:
    channel, _ = make_channel()
    channel.push(event(1))
    error = GenerationFailed("early")
    channel.fail(error)
    sink = Recorder()
    channel.attach(sink)
    assert sink.seen == [[1], error]


def test_cancelling_is_reported_once_and_not_after_the_end() -> None:
    channel, cancelled = make_channel()
    channel.cancel()
    channel.cancel()
    assert cancelled == [channel]
    ended, cancelled = make_channel()
    ended.push(event(1, is_last=True))
    ended.cancel()
    assert cancelled == []
