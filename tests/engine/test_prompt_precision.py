"""bfloat16 prompts of a real model: a text depends neither on other requests nor on how it was computed."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.engine.helpers import add_request, make_request, make_scheduler
from tests.support.checkpoints import make_model, save, save_tokenizer
from tgi_asgi.engine.sequence import Sequence as Sequence_
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.engine.step import Step
from tgi_asgi.runner.load import load
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.settings import Settings
from tgi_asgi.types import GenerationRequest, SamplingParams

Samples = list[tuple[int, float | None]]  # tokens and their log-probabilities
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostRunner]:
    directory = tmp_path_factory.mktemp("model")
    files = save(make_model(vocab_size=160), directory)
    save_tokenizer(directory)
    settings = Settings(
        prompt_precision="bfloat16", quantize="q8_0", num_threads=2, thread_nice=0, max_batch_size=16
    )
    found = load(settings, files).runner
    assert isinstance(found, HostRunner) and found.traits.has_prompt_arithmetic
    yield found
    found.close()


def request_of(prompt: Sequence[int], number: int, n: int = 1) -> GenerationRequest:
    sampling = SamplingParams(temperature=1.0, seed=number, logprobs=0)
    return make_request(prompt, MAX_TOKENS, sampling=sampling, n=n)


def prompt_of(number: int, length: int) -> list[int]:
    return [(number * 31 + at * 7) % 160 for at in range(length)]


class Served:
    """A scheduler with the real runner and two steps in flight."""

    def __init__(self, runner: HostRunner, **changes: Any) -> None:
        self.runner, self.stats = runner, EngineStats()
        sizes = {"num_blocks": runner.traits.num_blocks, "max_batch_size": 16, "max_step_tokens": 1000}
        values = {**sizes, **changes}
        self.scheduler = make_scheduler(has_prompt_arithmetic=True, stats=self.stats, **values)
        self.samples: dict[Sequence_, Samples] = defaultdict(list)
        self._num_arrived = 0

    def add(self, request: GenerationRequest) -> list[Sequence_]:
        self._num_arrived += 1
        return add_request(self.scheduler, request, self._num_arrived)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Compute steps until no work is left, or until `until` returns true."""
        flights: deque[Step] = deque()
        while True:
            while len(flights) < 2 and not until() and (step := self.scheduler.plan()) is not None:
                flights.append(step)
            if not flights:
                return
            step = flights.popleft()
            result = self.runner.run(step.plan)
            for row, sequence in self.scheduler.apply(step, result):
                sampled = result.sampled[row]
                if sampled is not None:
                    self.samples[sequence].append((sampled.token_id, sampled.logprob))
                if sequence.num_output == MAX_TOKENS:
                    self.scheduler.remove(sequence)

    def complete(self, *requests: GenerationRequest) -> list[Samples]:
        """Serve requests that arrive together; return each choice's sampled tokens."""
        sequences = [sequence for request in requests for sequence in self.add(request)]
        self.run()
        return [self.samples[sequence] for sequence in sequences]


def alone(runner: HostRunner, request: GenerationRequest) -> list[Samples]:
    return Served(runner, prefix_cache=False).complete(request)


def test_neither_others_nor_chunks_nor_preemptions_change_a_text(runner: HostRunner) -> None:
    requests = [request_of(prompt_of(at, 16 + 9 * at), at, n=1 + at % 3) for at in range(6)]
    expected = [each for request in requests for each in alone(runner, request)]
    served = Served(runner, num_blocks=20, max_prefill_tokens=32)
    assert served.complete(*requests) == expected
    assert served.stats.preemptions >= 3


def test_a_later_turn_finds_the_prompt_and_not_the_answer(runner: HostRunner) -> None:
    served = Served(runner)
    first = request_of(prompt_of(1, 50), 1)
    [answer] = served.complete(first)
    turn = request_of([*first.prompt_ids, *(token for token, _ in answer), 3, 4], 2)
    expected = alone(runner, turn)
    assert served.complete(turn) == expected
    assert served.stats.prefix_hit_tokens == 48  # the whole blocks of the prompt
    assert served.complete(request_of(turn.prompt_ids, 2)) == expected
    assert served.stats.prefix_hit_tokens == 48 + 80  # now a prompt has computed all of them


def test_an_answer_computed_again_does_not_find_the_same_tokens_of_a_prompt(runner: HostRunner) -> None:
    request = request_of(prompt_of(2, 32), 1)
    [expected] = alone(runner, request)
    served = Served(runner)
    [victim] = served.add(request)
    served.run(until=lambda: victim.num_output >= 20)
    text = request_of(list(victim.token_ids), 9)
    other = served.add(text)[0]
    served.run(until=lambda: not other.is_prefilling)
    served.scheduler._suspend(victim)
    served.run()
    assert served.samples[victim] == expected
