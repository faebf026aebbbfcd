"""The comparison of peers: order of turns, turns that count, intervals, goodput, resumed runs."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import peers
from bench.client import Answer
from bench.contenders import Lasts, LlamaCpp
from bench.intervals import advantage, estimate
from bench.peer_loads import Plan, Stage, chat_figures, stages
from bench.peer_models import Match, made
from bench.peers import MEMORY, MEMORY_USED, Record, Rounds, rows_of
from bench.report import command_line
from bench.turns import Turn, counted_turns, deviation, next_turn, order_of


def turn(index: int, name: str, before: float = 50.0, after: float = 50.0, **figures: float) -> Turn:
    return Turn(index, name, before, after, figures)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_orders_change_so_that_each_follows_each_other_once(count: int) -> None:
    names = [f"n{index}" for index in range(count)]
    orders = [order_of(names, index) for index in range(count)]
    for place in range(count):
        assert sorted(order[place] for order in orders) == names
    follows = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert follows == Counter(itertools.permutations(names, 2))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_orders_of_an_odd_number_are_balanced_over_twice_as_many_rounds(count: int) -> None:
    names = [f"n{index}" for index in range(count)]
    orders = [order_of(names, index) for index in range(2 * count)]
    for place in range(count):
        assert Counter(order[place] for order in orders) == dict.fromkeys(names, 2)
    follows = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert follows == dict.fromkeys(itertools.permutations(names, 2), 2)


def test_a_turn_is_as_far_off_as_the_worse_of_its_two_bandwidths() -> None:
    of_round = [turn(0, "a", 50, 50), turn(0, "b", 50, 45), turn(0, "c", 54, 50)]
    assert [round(deviation(each, of_round), 6) for each in of_round] == [0, 0.1, 0.08]


def test_missing_turns_come_first_and_uneven_ones_are_repeated_a_bounded_number_of_times() -> None:
    names = ["a", "b", "c"]
    turns: list[Turn] = []
    taken = []
    while following := next_turn(turns, names, 2, 3):
        index, name = following
        taken.append((index, name))
        is_slow = name == "b" and index == 0  # b's bandwidth is always lower in the first round
        turns.append(turn(index, name, 50, 44 if is_slow else 51))
    first, second = order_of(names, 0), order_of(names, 1)
    assert taken == [*((0, name) for name in first), (0, "b"), (0, "b"), *((1, name) for name in second)]
    assert [each.contender for each, is_even in counted_turns(turns) if not is_even] == ["b"]


def test_a_repeated_turn_that_is_even_counts_and_is_not_repeated_again() -> None:
    turns = [turn(0, "a"), turn(0, "b", 50, 30, speed=1), turn(0, "c"), turn(0, "b", 50, 52, speed=2)]
    assert next_turn(turns, ["a", "b", "c"], 1, 9) is None
    (found,) = [each for each, is_even in counted_turns(turns) if each.contender == "b" and is_even]
    assert found.figures == {"speed": 2}
    # The turn nearest to even counts, not the last.
    assert counted_turns([*turns, turn(0, "b", 50, 20, speed=3)])[1][0].figures == {"speed": 2}


def test_a_median_has_the_interval_of_all_resamples() -> None:
    values = [3.0, 1.0, 4.0, 2.0, 10.0]
    medians = [statistics.median(sample) for sample in itertools.product(values, repeat=5)]
    low, high = np.quantile(medians, (0.025, 0.975))
    found = estimate(values)
    assert (found.median, found.low, found.high, found.rounds) == (3.0, low, high, 5)
    assert estimate(values) == found  # the seed is fixed
    assert estimate([7.0]).low == estimate([7.0]).high == 7.0
    assert found.rounded() == {"median": 3.0, "low": low, "high": high, "rounds": 5}
    assert estimate([7.0]).rounded() == {"median": 7.0, "rounds": 1}  # one round has no interval
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_the_interval_of_a_median_holds_the_true_one_most_of_the_time() -> None:
    random = np.random.default_rng(5)
    samples = random.lognormal(0.0, 0.3, (400, 12))  # the true median is 1
    found = [estimate(list(row), resamples=500) for row in samples]
    coverage = sum(each.low <= 1.0 <= each.high for each in found) / len(found)
    assert 0.9 < coverage < 0.99
    assert statistics.mean(each.high - each.low for each in found) < 0.8


def test_an_advantage_is_paired_by_round() -> None:
    ours = {0: 10.0, 1: 20.0, 2: 40.0, 3: 80.0}  # the machine doubles its speed each round
    theirs = {0: 5.0, 1: 10.0, 2: 20.0, 3: 40.0, 4: 1.0}  # a round that `ours` lacks does not count
    found = advantage(ours, theirs, is_lower_better=False)
    assert found is not None and (found.median, found.low, found.high, found.rounds) == (2.0, 2.0, 2.0, 4)
    times = advantage(ours, theirs, is_lower_better=True)
    assert times is not None and times.median == 0.5
    assert advantage(ours, {0: 0.0, 1: 1.0}, is_lower_better=False) is None
    assert advantage(ours, {9: 1.0}, is_lower_better=False) is None


def answer(ttft_s: float, gap_s: float, tokens: int = 5, *, per_chunk: int = 1) -> Answer:
    chunks = 1 + (tokens - 1) // per_chunk
    token_s = tuple(ttft_s + index * gap_s * per_chunk for index in range(chunks))
    return Answer(0.0, token_s[-1], token_s, 100, tokens, "")


def test_goodput_counts_the_requests_that_meet_each_target() -> None:
    found = chat_figures(4, [answer(1, 0.02), answer(1, 0.03), answer(9, 0.06), answer(1.1, 0.2)])
    seconds = 9 + 4 * 0.06
    for target_ms, good in ((25, 1), (50, 2), (100, 3)):  # a late first token does not make a request bad
        assert found[f"4 clients: share within {target_ms} ms a token"] == good / 4
        rate = found[f"4 clients: requests/s within {target_ms} ms a token"]
        assert rate == pytest.approx(good / seconds)
    assert found["4 clients: tokens/s"] == pytest.approx(20 / seconds)
    assert (found["4 clients: TTFT p50, ms"], found["4 clients: TTFT p99, ms"]) == (1000, 9000)


def test_tokens_that_come_together_count_as_many() -> None:
    one, joined = (chat_figures(2, [answer(0.1, 0.02, 9, per_chunk=n)] * 2) for n in (1, 4))
    assert one["decode x2: tokens/s"] == pytest.approx(100)
    assert joined["decode x2: tokens/s"] == pytest.approx(100)
    alone = chat_figures(1, [answer(0.1, 0.02, 1)])
    assert "decode x1: tokens/s" not in alone  # one chunk has no gap
    assert not any("within" in figure for figure in alone)


def test_prompts_alone_share_the_server_of_one_client() -> None:
    assert stages(Plan((512, 2048), (1, 16), 100, 64)) == [
        Stage(1, (512, 2048), True, 2056),
        Stage(16, (), True, 164),
    ]
    assert stages(Plan((512,), (16,), 100, 64))[0] == Stage(1, (512,), False, 520)
    assert stages(Plan((), (4,), 100, 64)) == [Stage(4, (), True, 164)]


def test_every_slot_of_llama_server_holds_a_request() -> None:
    command = LlamaCpp("peer", Path("m.gguf"), Path("bin"), 2).command(80, clients=16, tokens=300)
    options = dict(zip(command[1::2], command[2::2], strict=False)) | dict(
        zip(command[2::2], command[3::2], strict=False)
    )
    assert (options["--parallel"], options["-c"]) == ("16", str(16 * 512))


class FakeServer:
    def __init__(self, url: str) -> None:
        self.url, self.start_s = url, 1.5

    def memory_mib(self) -> float:
        return 3000.0


class FakeContender:
    def __init__(self, name: str, lasts: Lasts, events: list[str], pool_mib: float = 0) -> None:
        self.name, self.lasts, self.pool_mib, self._events = name, lasts, pool_mib, events

    @contextlib.contextmanager
    def serve(self, clients: int, tokens: int) -> Iterator[tuple[Any, str]]:
        self._events.append(f"start {self.name} for {clients}")
        yield FakeServer(self.name), self.name
        self._events.append(f"stop {self.name}")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def measured(url: str, model: str, plan: Plan, stage: Stage) -> dict[str, float]:
        found.append(f"{model} x{stage.clients}")
        return {f"x{stage.clients}: tokens/s": 10.0 if model == "ours" else 4.0}

    monkeypatch.setattr(peers, "measure", measured)
    return found


def a_match(events: list[str]) -> Match:
    plan = Plan((), (1, 4), 100, 8)
    contenders = [
        FakeContender("ours", "turn", events),
        FakeContender("slots", "load", events),
        FakeContender("slow", "run", events, pool_mib=1024),
    ]
    return Match("tiny", plan, contenders)


def test_servers_run_for_a_load_a_turn_or_all_rounds(events: list[str]) -> None:
    match = a_match(events)
    rounds = Rounds(match, [], rounds=2, tries=1, bandwidth=lambda: 50.0)
    names = [each.contender for each in rounds.run()]
    assert names == order_of(["ours", "slots", "slow"], 0) + order_of(["ours", "slots", "slow"], 1)
    text = " | ".join(events)
    assert "start ours for 1 | ours x1 | ours x4 | stop ours" in text
    assert "start slots for 1 | slots x1 | stop slots | start slots for 4 | slots x4 | stop slots" in text
    assert events.count("start slow for 1") == 1 and events[-1] == "stop slow"
    memory = {each.contender: (each.figures[MEMORY], each.figures[MEMORY_USED]) for each in rounds.turns}
    assert memory == {"ours": (3000, 3000), "slots": (3000, 3000), "slow": (3000, 1976)}
    row = next(row for row in rows_of(rounds.turns, list(memory)) if row["figure"] == "x4: tokens/s")
    assert row["advantage"]["ours"]["slow"] == {"median": 2.5, "low": 2.5, "high": 2.5, "rounds": 2}
    row = next(row for row in rows_of(rounds.turns, list(memory)) if row["figure"] == MEMORY_USED)
    assert row["advantage"]["ours"]["slow"]["median"] == pytest.approx(1976 / 3000, rel=1e-3)


def test_a_run_that_was_interrupted_goes_on(
    events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "peers.json"
    monkeypatch.setattr(peers, "commit", lambda: "abc")
    monkeypatch.setattr(peers, "matches_of", lambda *_: [a_match(events)])
    monkeypatch.setattr("sys.argv", ["peers.py", "--rounds", "2", "--out", str(out)])
    answers = iter([50.0] * 5)

    def interrupted() -> float:
        for value in answers:
            return value
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "read_bandwidth", interrupted)
    with pytest.raises(KeyboardInterrupt):
        peers.main()
    assert len(json.loads(out.read_text())["matches"][0]["turns"]) == 2
    events.clear()
    monkeypatch.setattr(peers, "read_bandwidth", lambda: 50.0)
    peers.main()
    assert sum(event.startswith("start ours") for event in events) == 1  # its first turn was kept
    (match,) = json.loads(out.read_text())["matches"]
    assert len(match["turns"]) == 6 and match["repeated_turns"] == 0 and match["uneven_turns"] == []
    assert Record(out, is_anew=False).turns("tiny") == [Turn.read(each) for each in match["turns"]]
    assert Record(out, is_anew=True).turns("tiny") == []
    monkeypatch.setattr(peers, "commit", lambda: "another")
    assert Record(out, is_anew=False).turns("tiny") == []  # figures of two commits are not mixed


def test_a_copy_that_was_interrupted_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "copy"
    with pytest.raises(RuntimeError):
        made(path, _half)
    assert made(path, lambda partial: partial.write_text("whole")).read_text() == "whole"
    assert made(path, _half).read_text() == "whole"  # it exists, so `_half` is not called


def _half(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError


def test_a_record_s_command_names_files_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "bench/peers.py",
        "--libraries",
        "libc.so.4:/opt/v/lib/libd.so",
        "--out",
        "a/b.json",
        "http://a/b",
    ]
    monkeypatch.setattr("sys.argv", words)
    assert command_line() == "python -m bench.peers --libraries libc.so.4:libd.so --out b.json http://a/b"
