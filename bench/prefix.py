"""The cost of prompts with a common beginning, turn by turn and at once: tokens computed, first-token times.

    python -m bench.prefix --turns 20 --system-tokens 4096 [--model-id model.gguf]

A turn adds the last answer and a new question. At best only the question is computed; anything beyond it is
the turn's excess, at most a block if the cache works as promised. (An answer's text may be tokenised
differently from the sampled tokens; the prefix then ends there, which the excess shows.) Then the last turn's
prompt is sent again under unique cache salts, which measures its time without a cache. Finally a burst:
prompts with a new common beginning, all at once, whose beginning is at best computed once. Prints one JSON
object and a table. Unknown flags go to the server.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.client import Answer, Client
from bench.loads import Prompts
from bench.report import command_line, emit, machine, median, spread, table
from bench.servers import Server

Messages = list[dict[str, str]]


class Conversation:
    """Turns of a chat, each sent with the whole conversation so far."""

    def __init__(self, client: Client, system: str, max_tokens: int) -> None:
        self._client = client
        self._body = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
        self.messages: Messages = [{"role": "system", "content": system}]
        self._num_known = 0  # tokens of the last prompt and answer

    async def turn(self, question: str) -> dict[str, Any]:
        """Ask; return the cost of the turn."""
        self.messages.append({"role": "user", "content": question})
        answer = await self.ask()
        self.messages.append({"role": "assistant", "content": answer.text})
        num_new = answer.num_prompt_tokens - self._num_known
        num_computed = answer.num_prompt_tokens - answer.num_cached_tokens
        self._num_known = answer.num_prompt_tokens + answer.num_tokens
        return {
            "prompt_tokens": answer.num_prompt_tokens,
            "new_tokens": num_new,
            "computed_tokens": num_computed,
            "excess_tokens": num_computed - num_new,
            "ttft_ms": round(answer.ttft_s * 1e3, 1),
        }

    async def ask(self, **fields: Any) -> Answer:
        """Send the messages as they are."""
        return Answer.read(await self._client.chat({**self._body, "messages": self.messages, **fields}))


async def burst(client: Client, text: Callable[[int], str], options: argparse.Namespace) -> dict[str, Any]:
    """Send prompts with a common beginning, and one more after them, which shows how many tokens are its own.

    A prompt before them keeps the engine busy until all of them have arrived.
    """
    system = text(options.burst_shared)
    ahead = asyncio.create_task(Conversation(client, text(10), 2).turn(text(2 * options.burst_shared)))
    await asyncio.sleep(0.3)

    async def ask() -> Answer:
        talk = Conversation(client, system, options.max_tokens)
        talk.messages.append({"role": "user", "content": text(options.burst_own)})
        return await talk.ask()

    answers = await asyncio.gather(*(ask() for _ in range(options.burst)))
    last = await ask()
    await ahead
    num_own = last.num_prompt_tokens - last.num_cached_tokens
    computed = sum(answer.num_prompt_tokens - answer.num_cached_tokens for answer in answers)
    return {
        "prompts": options.burst,
        "prompt_tokens": sum(answer.num_prompt_tokens for answer in answers),
        "computed_tokens": computed,
        "min_tokens": last.num_prompt_tokens + (options.burst - 1) * num_own,
        "ttft_ms": spread([answer.ttft_s for answer in answers], 1e3, 1),
    }


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Hold the conversation, then ask its last question without a cache."""
    client = Client(url)
    words = Prompts(options.question_tokens)

    def text(num_words: int) -> str:
        return " ".join(words.words(num_words))

    try:
        warm_up = Conversation(client, text(10), 4)
        await warm_up.turn(text(10))
        talk = Conversation(client, text(options.system_tokens), options.max_tokens)
        turns = [await talk.turn(text(options.question_tokens)) for _ in range(options.turns)]
        talk.messages.pop()
        cold = [await talk.ask(cache_salt=f"cold {run}", max_tokens=1) for run in range(options.runs)]
        at_once = await burst(client, text, options)
    finally:
        client.close()
    if any(answer.num_cached_tokens for answer in cold):
        raise SystemExit("a salt of its own did not keep a prompt from the cache")
    cold_ms = median((answer.ttft_s * 1e3 for answer in cold), 1)
    return {
        "turns": turns,
        "excess_tokens_max": max((turn["excess_tokens"] for turn in turns[1:]), default=0),
        "last_turn": {"ttft_ms": turns[-1]["ttft_ms"], "cold_ttft_ms": cold_ms},
        "speedup": round(cold_ms / turns[-1]["ttft_ms"], 1),
        "burst": at_once,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--system-tokens", type=int, default=4096, help="about so many, one a word")
    parser.add_argument("--question-tokens", type=int, default=64, help="of each turn")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--runs", type=int, default=3, help="repetitions of the last prompt without a cache")
    parser.add_argument("--burst", type=int, default=32, help="prompts at once")
    parser.add_argument("--burst-shared", type=int, default=1000, help="tokens that they share, about")
    parser.add_argument("--burst-own", type=int, default=16, help="and that they do not")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options, arguments = parser.parse_known_args()
    record: dict[str, Any] = {"bench": "prefix", "command": command_line(), "machine": machine()}
    with Server.ours(arguments) as server:
        record |= asyncio.run(measure(server.url, options))
    emit(record, options.out)
    head = list(record["turns"][0])
    print(table(["turn", *head], ([at, *turn.values()] for at, turn in enumerate(record["turns"], 1))))
    last = record["last_turn"]
    print(f"turn {options.turns}: {last['ttft_ms']} ms, cold {last['cold_ttft_ms']} ms")


if __name__ == "__main__":
    main()
