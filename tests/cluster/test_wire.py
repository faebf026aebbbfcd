"""Messages between an ingress and replicas survive serialisation."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest

from tgi_asgi import errors
from tgi_asgi.cluster.totals import Totals, snapshot
from tgi_asgi.cluster.wire import join_digests, pack_events, split_digests, unpack_events
from tgi_asgi.engine.hits import group_key
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.types import FinishReason, TokenEvent

ERRORS = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.TgiError)
]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_comes_out_as_it_went_in(kind: type[errors.TgiError]) -> None:
    given: dict[str, Any] = {"num_tokens": 5, "max_tokens": 4, "allow": ("GET",)}
    if kind is errors.UnknownAdapter:
        given["param"] = "model"
    names = inspect.signature(kind).parameters
    error = kind("what is wrong", **{name: value for name, value in given.items() if name in names})
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind
    assert (str(found), found.args, vars(found)) == (str(error), (error.message,), vars(error))


def test_events_come_out_as_they_went_in() -> None:
    event = TokenEvent(1, 17, b"\xe2", "", -0.5, [(17, -0.5)], True, FinishReason.STOP, "end")
    [found] = unpack_events(pickle.loads(pickle.dumps(pack_events([event]))))
    for name in TokenEvent.__slots__:
        assert getattr(found, name) == getattr(event, name)


def test_a_template_renders_the_same_elsewhere() -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    template = ChatTemplate(source, {"bos_token": "<s>"}, tool_use_source=source + "!")
    found = pickle.loads(pickle.dumps(template))
    messages = [{"role": "user", "content": "hi"}]
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        assert found.render(messages, tools=tools) == template.render(messages, tools=tools)


def test_counters_add_up_and_stay_when_a_replica_goes() -> None:
    totals = Totals()
    for number, name in enumerate(("a", "b"), 1):
        stats = EngineStats()
        stats.steps, stats.running = 10 * number, number
        stats.step_s["decode"].observe(0.01, number)
        totals.update(name, snapshot(stats))
    totals.sum_up()
    assert (totals.stats.steps, totals.stats.running, totals.stats.step_s["decode"].count) == (30, 3, 3)
    totals.retire("b")
    totals.sum_up()
    assert (totals.stats.steps, totals.stats.running, totals.stats.step_s["decode"].count) == (30, 1, 3)


def test_a_replica_that_comes_back_is_not_counted_twice() -> None:
    totals = Totals()

    def counted(name: str, steps: int) -> int:
        stats = EngineStats()
        stats.steps = steps
        totals.update(name, snapshot(stats))
        totals.sum_up()
        return totals.stats.steps

    assert counted("a", 10) == 10
    totals.retire("a")
    assert counted("b", 5) == 15
    assert counted("a", 12) == 17
    totals.retire("a")
    for number in range(40):  # gone for good: only the sum is kept
        assert counted(f"other {number}", 1) == 18 + number
        totals.retire(f"other {number}")
    totals.sum_up()
    assert totals.stats.steps == 57
    assert len(totals._absent) < 40


def test_a_report_has_the_blocks_of_the_first_group_of_layers() -> None:
    """A model with windows has several blocks for the same tokens; an ingress knows one digest per block."""
    digests = [bytes([number]) * 16 for number in range(3)]
    keys = [group_key(digest, group) for digest in digests for group in range(3)]
    assert len(set(keys)) == 9
    assert split_digests(join_digests(keys)) == digests
