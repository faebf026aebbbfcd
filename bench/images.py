"""The effect of an arriving image on running streams, compared with a text prompt of the same cost.

    python -m bench.images [--edge 1024] [--streams 4] [--repeats 8] [--out FILE]

The model has the shape of SmolVLM-256M-Instruct, with random weights (`bench.images_model`). First the
program finds the length of a text prompt whose time to the first token on an idle server equals the image's.
Then images and such prompts arrive alternately while streams decode. For each it measures the times between
the streams' tokens (ITL) from sending the prompt to its first token, and that time itself (TTFT). The ratio
is the p99 of ITL, image over text, within a turn; its median, minimum and maximum are printed. Unknown flags
go to the server.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import random
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from bench.client import Answer, Client
from bench.images_model import make_checkpoint
from bench.loads import WORDS
from bench.report import command_line, emit, machine, median, percentile, spread, table
from bench.servers import Server

_TUNING_ROUNDS = 6
_TUNED_SHARE = 0.05  # how near the text prompt's time must come to the image's
_ANSWER_TOKENS = 4
_WARM_UP_S = 1.5  # streams decode for this long before the prompt arrives


@dataclass(slots=True)
class Arrivals:
    """The measurements of one kind of prompt.

    Attributes:
        itl_s: Per turn, the times between tokens of all streams while the prompt was computed.
    """

    itl_s: list[list[float]] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)

    @property
    def p99_s(self) -> list[float]:
        """Return the p99 of each turn."""
        return [percentile(each, 0.99) for each in self.itl_s]

    def summary(self) -> dict[str, Any]:
        """Return the percentiles over all turns."""
        return {
            "itl_ms": spread([gap for each in self.itl_s for gap in each], 1e3, 1),
            "ttft_s": median(self.ttft_s),
        }


class Load:
    """Sends streams, images and texts, each different from all before."""

    def __init__(self, url: str, options: argparse.Namespace) -> None:
        self._client, self._options = Client(url), options
        self._random = random.Random(0)
        self.num_words = 1000

    async def ask(self, content: Any, max_tokens: int = _ANSWER_TOKENS) -> Answer:
        """Send one request and return its answer."""
        message = {"role": "user", "content": content}
        body = {"messages": [message], "max_tokens": max_tokens, "ignore_eos": True, "temperature": 1.0}
        return Answer.read(await self._client.chat(body))

    def prompt(self, kind: str) -> Any:
        """Return the content of an image prompt or of a text prompt."""
        return self._image() if kind == "image" else self._text(self.num_words)

    async def tune(self) -> float:
        """Find the text's length; return the seconds to the first token of an image on an idle server."""
        image_s = statistics.median([(await self.ask(self._image())).ttft_s for _ in range(4)][1:])
        for _ in range(_TUNING_ROUNDS):
            text_s = min([(await self.ask(self._text(self.num_words))).ttft_s for _ in range(2)])
            if abs(text_s / image_s - 1) < _TUNED_SHARE:
                break
            self.num_words = int(self.num_words * image_s / text_s)
        return image_s

    async def arrive(self, kind: str, into: Arrivals) -> list[float]:
        """Send a prompt while the streams run; return the times between their tokens after its answer."""
        options = self._options
        streams = [
            asyncio.create_task(self.ask(self._text(10), options.stream_tokens))
            for _ in range(options.streams)
        ]
        await asyncio.sleep(_WARM_UP_S)
        answer = await self.ask(self.prompt(kind))
        begin_s, end_s = answer.due_s, answer.token_s[0]
        during, after = list[float](), list[float]()
        for stream in await asyncio.gather(*streams):
            if stream.token_s[-1] < end_s:
                raise SystemExit("the streams ended before the prompt had its first token: --stream-tokens")
            for before_s, at_s in itertools.pairwise(stream.token_s):
                if at_s > begin_s and before_s < end_s:
                    during.append(at_s - before_s)
                elif before_s > answer.end_s:
                    after.append(at_s - before_s)
        into.itl_s.append(during)
        into.ttft_s.append(answer.ttft_s)
        return after

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _text(self, num_words: int) -> str:
        return " ".join(self._random.choices(WORDS, k=num_words))

    def _image(self) -> list[dict[str, Any]]:
        colours = PIL.Image.frombytes("RGB", (8, 8), self._random.randbytes(192))
        file = io.BytesIO()
        colours.resize((self._options.edge, self._options.edge)).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tune, then send images and texts in turn."""
    load = Load(url, options)
    found = {"image": Arrivals(), "text": Arrivals()}
    alone: list[float] = []
    try:
        image_s = await load.tune()
        sizes = {kind: (await load.ask(load.prompt(kind))).num_prompt_tokens for kind in found}
        for turn in range(options.repeats):
            for kind in sorted(found, reverse=bool(turn % 2)):
                alone += await load.arrive(kind, found[kind])
    finally:
        load.close()
    ratios = [a / b for a, b in zip(found["image"].p99_s, found["text"].p99_s, strict=True)]
    return {
        "alone_ttft_s": round(image_s, 2),
        "prompt_tokens": sizes,
        "itl_alone_ms": spread(alone, 1e3, 1),
        **{kind: arrivals.summary() for kind, arrivals in found.items()},
        "p99_ms": {kind: [round(1e3 * each, 1) for each in found[kind].p99_s] for kind in found},
        "p99_ratio": median(ratios),
        "p99_ratios": [round(ratio, 2) for ratio in sorted(ratios)],
    }


def main() -> None:
    """Make the model, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--edge", type=int, default=1024, help="pixels a side; each 512 x 512 are a tile")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--stream-tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--repeats", type=int, default=8, help="turns of an image and a text")
    parser.add_argument(
        "--model", type=Path, help="folder of the checkpoint, to make it once (default: none)"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options, arguments = parser.parse_known_args()
    record: dict[str, Any] = {"bench": "images", "command": command_line(), "machine": machine()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or Path(temporary)
        if not (folder / "config.json").exists():
            make_checkpoint(folder, options.edge)
        with Server.ours(["--model-id", str(folder), *arguments]) as server:
            record |= asyncio.run(measure(server.url, options))
    emit(record, options.out)
    head = ["while it comes", "tokens", "TTFT, s", "ITL p50, ms", "p90", "p99"]
    rows = [
        [kind, record["prompt_tokens"][kind], record[kind]["ttft_s"], *record[kind]["itl_ms"].values()]
        for kind in ("image", "text")
    ]
    print(table(head, [*rows, ["nothing", None, None, *record["itl_alone_ms"].values()]]))
    ratios = record["p99_ratios"]
    print(f"p99 of ITL, image over text: {record['p99_ratio']} ({ratios[0]} to {ratios[-1]})")


if __name__ == "__main__":
    main()
