"""The choice of a replica: cached blocks against load, and what the table knows of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tgi_asgi.cluster.table import STREAM_TOKENS, KnownReplica, ReplicaTable
from tgi_asgi.cluster.wire import CacheVersion, Report

BLOCK = 16


def digests(prefix: str, count: int) -> list[bytes]:
    return [f"{prefix}{number:>15}".encode()[:16] for number in range(count)]


def report(
    name: str, *found: bytes, lost: Sequence[bytes] = (), is_whole: bool = True, num_open: int = 0
) -> Report:
    return Report(name, CacheVersion("life", 1), is_whole, b"".join(found), b"".join(lost), num_open)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> ReplicaTable:
    """Return a table of three idle replicas whose random sample keeps their order."""
    made = ReplicaTable(BLOCK, clock=clock, sample=lambda items, count: list(items)[:count])
    for name in "abc":
        made.update(report(name))
    return made


def test_the_replica_with_most_of_the_blocks_comes_first(table: ReplicaTable) -> None:
    prompt = digests("p", 10)
    table.update(report("b", *prompt[:9]))
    table.update(report("c", *prompt[:4]))
    assert table.order(prompt, 10 * BLOCK) == ["b", "c", "a"]


def test_blocks_behind_a_gap_do_not_count(table: ReplicaTable) -> None:
    prompt = digests("p", 10)
    table.update(report("a", *prompt[1:]))
    table.update(report("b", prompt[0]))
    assert table.order(prompt, 10 * BLOCK)[0] == "b"


def test_states_say_how_far_a_prompt_goes_on(table: ReplicaTable) -> None:
    """For a model with recurrent layers, a replica reports only the blocks that end at a saved state."""
    prompt = digests("p", 10)
    table.update(replace(report("a", prompt[0], prompt[6]), has_states=True))
    table.update(replace(report("b", prompt[3], digests("q", 9)[8]), has_states=True))
    assert [table.replicas[name].num_held(prompt) for name in "ab"] == [7, 4]
    table.send("b", digests("r", 5), 5 * BLOCK + 1).end()
    assert [table.replicas["b"].num_held(digests("r", count)) for count in (4, 5, 6)] == [0, 5, 5]
    table.update(replace(report("a", lost=prompt[6:7], is_whole=False), has_states=True))
    assert table.replicas["a"].num_held(prompt) == 1


def test_a_busy_replica_loses_to_one_that_must_compute_the_prompt(table: ReplicaTable) -> None:
    prompt = digests("p", 10)
    table.update(report("a", *prompt))
    ahead = table.send("a", digests("q", 7), 7 * BLOCK)
    assert table.order(prompt, 10 * BLOCK)[0] == "a"  # 112 tokens and a stream wait; 160 are saved
    table.send("a", digests("r", 7), 7 * BLOCK)
    assert table.order(prompt, 10 * BLOCK)[0] != "a"
    ahead.end()
    assert table.order(prompt, 10 * BLOCK)[0] == "a"


def test_what_was_sent_is_expected_before_it_is_reported(table: ReplicaTable) -> None:
    prompt = digests("p", 4)
    table.send("c", prompt, 4 * BLOCK + 3).end()
    assert table.order(prompt, 4 * BLOCK + 3)[0] == "c"


def test_what_is_expected_and_never_reported_is_forgotten(table: ReplicaTable, clock: Clock) -> None:
    prompt = digests("p", 4)
    table.send("c", prompt, 4 * BLOCK).end()
    clock.now_s = 31.0
    table.update(report("c", is_whole=False))
    assert table.replicas["c"].num_held(prompt) == 0


def test_what_a_replica_has_lost_is_forgotten(table: ReplicaTable) -> None:
    prompt = digests("p", 4)
    table.update(report("a", *prompt))
    table.update(report("a", lost=prompt[2:], is_whole=False))
    assert table.replicas["a"].num_held(prompt) == 2


def test_a_replica_that_started_again_has_nothing(table: ReplicaTable) -> None:
    prompt = digests("p", 4)
    table.update(report("a", *prompt))
    table.update(report("a"))
    assert table.replicas["a"].num_held(prompt) == 0


def test_others_requests_count_as_load(table: ReplicaTable) -> None:
    table.update(report("a", num_open=3))
    table.send("b", [], 5)
    assert table.replicas["a"].load == 3 * STREAM_TOKENS
    assert table.order([], 5)[0] == "c"


def test_a_ticket_gives_back_what_it_took_once(table: ReplicaTable) -> None:
    ticket = table.send("a", [], 100)
    assert table.replicas["a"].load == 100 + STREAM_TOKENS
    ticket.begin()
    ticket.begin()
    assert table.replicas["a"].load == STREAM_TOKENS
    ticket.end()
    ticket.end()
    assert table.replicas["a"].load == 0


def test_only_those_that_serve_an_adapter_are_asked_for_it(table: ReplicaTable) -> None:
    table.update(Report("b", CacheVersion(), adapters={"sql": "key"}))
    assert table.order([], 5, "sql") == ["b"]


def test_a_silent_replica_is_left_out_until_it_reports(table: ReplicaTable) -> None:
    table.replicas["a"].num_missed = 2
    assert sorted(table.order([], 5)) == ["b", "c"]
    table.update(report("a"))
    assert sorted(table.order([], 5)) == ["a", "b", "c"]


def test_of_many_replicas_the_best_and_two_at_random_are_compared(clock: Clock) -> None:
    def sampled(items: Sequence[KnownReplica], count: int) -> list[KnownReplica]:
        return sorted(items, key=lambda each: each.name)[:count]

    table = ReplicaTable(BLOCK, clock=clock, sample=sampled)
    for name in "abcdef":
        table.update(report(name, num_open=0 if name == "f" else 1))
    prompt = digests("p", 2)
    table.update(report("e", *prompt, num_open=1))
    assert table.order(prompt, 2 * BLOCK)[0] == "e"
    assert table.order([], 200)[0] in "abc"  # not the idle one: other ingresses would choose it too
