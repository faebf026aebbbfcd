"""The benefit of drafts: tokens per second with and without them, in turns, and the cost of verifying them.

    python -m bench.drafts [--model-id model.gguf] [--speculate 8] [--rounds 5] [--only edit,turn]
    python -m bench.drafts --forced [--model-id model.gguf]

The first form asks the engine, without HTTP, for an edit of a quoted text, the second turn of a chat, a
sampled text, and 64 streams of random prompts. With and without drafts, the same model in one process answers
in turns; the answers must be equal. With --forced the drafts are the known continuation, each wrong with a
given probability: measures the time of a step with 1, 2, 4 and 8 rows of one sequence, and tokens per second
at 0, 50 and 90 % correct drafts. Prints one JSON object and a table. Unknown flags are settings of the
project's server, as on its command line.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.engine import settings_of
from bench.report import command_line, emit, machine, median, numbers, table
from tgi_asgi.engine.engine import Engine
from tgi_asgi.formats.sources import resolve
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.runner.plan import SlotStart, StepPlan, StepRow
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.settings import Settings
from tgi_asgi.types import GenerationRequest, SamplingParams, StopConditions, TokenEvent

GREEDY = SamplingParams(temperature=0.0)
# Both engines learn what a step costs, and from it how many prompt tokens fit into one: while one engine had
# learned less than the other, 64 prompts took it two steps more, of 50.
_WARM_TURNS = 4
STORY = """The harbour of Ostrava lay quiet in the early morning. Captain Miller walked along the pier, past
the nets and the barrels, and looked for the boat that had come in during the night. It was a small
boat with a red sail, and nobody knew whose it was. The harbour master had written its name into his
book: Swallow. Captain Miller asked the fishermen, but they had seen nothing. Only old Anna, who
sold bread at the gate, had heard voices before dawn. Two men had carried a long box up the hill,
she said, and one of them had a lantern. Captain Miller thanked her, bought a loaf of bread, and
went up the hill himself. Behind the chapel he found the box, open and empty, and beside it the
tracks of a cart that led away to the north, along the river."""


class Sink:
    """Collects one request's tokens."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.ended = asyncio.Event()

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        self.token_ids += [event.token_id for event in events]
        if any(event.finish is not None for event in events):
            self.ended.set()

    def on_error(self, error: Exception) -> None:
        raise error


class Side:
    """One way of serving: a model, an engine, and its results."""

    def __init__(self, settings: Settings) -> None:
        self.model = load(settings, resolve(settings, lambda *_: None), lambda *_: None)
        self.engine = Engine(self.model.runner, self.model.tokenizer, settings, self.model.info)

    async def ask(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, count: int) -> Any:
        """Answer prompts concurrently; return tokens per second from the first step on, and the tokens."""
        sinks = [Sink() for _ in prompts]
        start_s = time.perf_counter()
        for number, (prompt, sink) in enumerate(zip(prompts, sinks, strict=True)):
            stop = StopConditions(max_tokens=count, ignore_eos=sampling is not GREEDY)
            request = GenerationRequest(f"r{number}", list(prompt), replace(sampling, seed=number), stop)
            self.engine.submit(request, self.engine.acquire(1)).attach(sink)
        await asyncio.gather(*(sink.ended.wait() for sink in sinks))
        seconds = time.perf_counter() - start_s
        tokens = [sink.token_ids for sink in sinks]
        return sum(map(len, tokens)) / seconds, tokens


def chat(model: LoadedModel, *turns: str) -> list[int]:
    """Return the tokens of a conversation, the user's turn first, up to where the answer begins."""
    roles = ("user", "assistant")
    text = "".join(f"<|im_start|>{roles[at % 2]}\n{turn}<|im_end|>\n" for at, turn in enumerate(turns))
    return model.tokenizer.encode(text + "<|im_start|>assistant\n", add_special_tokens=False)


async def scenes(side: Side) -> dict[str, tuple[list[list[int]], SamplingParams, int]]:
    """Return the requests: prompts, sampling parameters, maximum tokens of an answer."""
    model, rng = side.model, random.Random(0)
    edit = "Repeat this text word by word, but write Swift instead of Swallow:\n\n" + STORY.replace("\n", " ")
    first = "Write a Python function that reads a CSV file and returns the sum of a column."
    _, [answer] = await side.ask([chat(model, first)], GREEDY, 220)
    said = model.tokenizer.decode(answer, skip_special_tokens=True)
    second = chat(model, first, said, "Add a docstring to it, and write the whole function again.")
    vocab = model.info.vocab_size

    def noise(count: int) -> list[list[int]]:
        return [[rng.randrange(vocab) for _ in range(64)] for _ in range(count)]

    hot = SamplingParams(temperature=1.0)
    return {
        "edit of a quoted text": ([chat(model, edit)], GREEDY, 240),
        "second turn of a chat": ([second], GREEDY, 220),
        "sampled text": ([chat(model, "Tell me a story.")], hot, 200),
        "random tokens": (noise(1), hot, 200),
        "64 streams": (noise(64), hot, 48),
    }


async def compare(options: argparse.Namespace, settings: Settings) -> list[dict[str, Any]]:
    """Answer every scene with and without drafts, in turns."""
    sides = [Side(settings), Side(replace(settings, speculate=options.speculate))]
    for side in sides:
        side.engine.start()
    rows = []
    [asked, _] = [await scenes(side) for side in sides]
    for name, (prompts, sampling, count) in asked.items():
        if options.only and not any(word in name for word in options.only):
            continue
        rates: list[list[float]] = [[], []]
        before = [sides[1].engine.stats.draft_tokens, sides[1].engine.stats.accepted_draft_tokens]
        for turn in range(-_WARM_TURNS, options.rounds):
            answers = []
            for index, side in enumerate(sides if turn % 2 else sides[::-1]):
                which = index if turn % 2 else 1 - index
                side.engine.scheduler.pool.reset()
                rate, tokens = await side.ask(prompts, sampling, count)
                answers.append(tokens)
                if turn >= 0:
                    rates[which].append(rate)
            assert answers[0] == answers[1], f"drafts have changed an answer: {name}"
        stats = sides[1].engine.stats
        ratios = sorted(with_ / without for without, with_ in zip(*rates, strict=True))
        rows.append(
            {
                "what": name,
                "without": median(rates[0]),
                "with": median(rates[1]),
                "ratio": median(ratios, 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "drafts": stats.draft_tokens - before[0],
                "drawn": stats.accepted_draft_tokens - before[1],
            }
        )
    for side in sides:
        await side.engine.stop()
        side.model.runner.close()
    return rows


@contextmanager
def scripted(runner: HostRunner, text: Sequence[int], right: float, rng: random.Random) -> Iterator[None]:
    """Make the drafts of slot 0 this continuation of its prompt, each wrong with a given probability."""
    drafts = runner._drafts
    assert drafts is not None
    choose = drafts.choose

    def known(plan: StepPlan, starts: Sequence[int], certain: Any) -> list[list[int]]:
        [row], [start] = plan.rows, starts
        following = text[start + 1 : start + 1 + row.num_drafts]
        return [[token if rng.random() < right else (token + 1) % 1000 for token in following]]

    drafts.choose = known  # type: ignore[method-assign]
    yield
    drafts.choose = choose  # type: ignore[method-assign]


def decode(
    runner: HostRunner, prompt: list[int], count: int, num_drafts: int
) -> tuple[list[int], list[float]]:
    """Generate tokens in the calling thread; return prompt and output, and the time of each step."""
    table = list(range(-(-(len(prompt) + count + 1) // runner.traits.block_size)))
    plan = StepPlan(0, [StepRow(0, prompt, 0, [table], True)], [SlotStart(0, GREEDY, 0, prompt)])
    first = runner.run(plan).sampled[0]
    assert first is not None
    text, times, stop = [*prompt, first.token_id], [], len(prompt) + count
    while len(text) < stop:
        row = StepRow(
            0, None, len(text) - 1, [table], True, is_generated=True, stop=stop, num_drafts=num_drafts
        )
        start_s = time.perf_counter()
        result = runner.run(StepPlan(0, [row]))
        times.append(time.perf_counter() - start_s)
        for sampled in (result.sampled[0], *result.draft_samples.get(0, [])):
            assert sampled is not None
            text.append(sampled.token_id)
    return text, times


def force(options: argparse.Namespace, settings: Settings) -> list[dict[str, Any]]:
    """Measure steps of several rows, and tokens per second by the share of correct drafts."""
    settings = replace(settings, speculate=8)
    runner = load(settings, resolve(settings, lambda *_: None), lambda *_: None).runner
    assert isinstance(runner, HostRunner)
    rng = random.Random(0)
    prompt = [rng.randrange(3, 1000) for _ in range(64)]
    text, _ = decode(runner, prompt, options.tokens, 0)
    rows = []
    times: dict[tuple[int, float], list[float]] = {}
    rates: dict[tuple[int, float], list[float]] = {}
    for _ in range(options.rounds):
        for num_rows in options.rows:
            for right in (0.0, 0.5, 0.9):
                with scripted(runner, text, right, rng):
                    found, taken = decode(runner, prompt, options.tokens, num_rows - 1)
                assert found[: len(text)] == text, "drafts have changed the text"
                # Only full steps count: the last ones have fewer rows left.
                times.setdefault((num_rows, right), []).append(median(taken, 7))
                rates.setdefault((num_rows, right), []).append((len(found) - len(prompt) - 1) / sum(taken))
    alone_s, alone = median(times[1, 0.0], 7), median(rates[1, 0.0])
    for (num_rows, right), taken in times.items():
        rows.append(
            {
                "what": f"{num_rows} rows, {right:.0%} right",
                "step_ms": round(median(taken, 7) * 1e3, 3),
                "cost": round(median(taken, 7) / alone_s, 3),
                "tokens_per_s": median(rates[num_rows, right], 1),
                "ratio": round(median(rates[num_rows, right]) / alone, 3),
            }
        )
    runner.close()
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--speculate", type=int, default=8, help="most drafts of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=numbers(str), default=[], help="words of the scenes to run")
    parser.add_argument("--forced", action="store_true", help="drafts of a known text")
    parser.add_argument("--rows", type=numbers(int), default=[1, 2, 4, 8], help="of a step, with --forced")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, with --forced")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options, arguments = parser.parse_known_args()
    settings = settings_of(arguments)
    rows = force(options, settings) if options.forced else asyncio.run(compare(options, settings))
    record = {"bench": "drafts", "command": command_line(), "machine": machine(), "rows": rows}
    emit(record, options.out)
    keys = [key for key in rows[0] if key != "ratios"]
    print(table(keys, ([row[key] for key in keys] for row in rows)))


if __name__ == "__main__":
    main()
