"""The speed of llama.cpp's server with LoRA adapters, for `bench.adapters`.

It computes the requests of one set of adapters at a time, while others wait.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report import percentile
from bench.servers import Server, free_port

_CLIENTS, _TOKENS, _PROMPT = 8, 48, 128


def measure_llama(
    programs: Path, gguf: Path, folders: Sequence[Path], threads: int, rounds: int
) -> list[dict[str, Any]]:
    """Return tokens/s of eight clients together, without adapters, with one, with eight; and of one."""
    port = free_port()
    adapters = ",".join(str(folder / "adapter.gguf") for folder in folders)
    command = [
        *(str(programs / "llama-server"), "-m", str(gguf), "--no-webui", "-t", str(threads)),
        *("-tb", str(threads), "--host", "127.0.0.1", "--port", str(port)),
        *("--parallel", str(_CLIENTS), "-c", str(_CLIENTS * 512)),
        *("--lora-init-without-apply", "--lora", adapters),
    ]
    none: list[dict[str, float]] = [{"id": each, "scale": 0.0} for each in range(len(folders))]

    def only(which: int) -> list[dict[str, float]]:
        return [{**each, "scale": 1.0 if each["id"] == which else 0.0} for each in none]

    kinds = {
        "x1, none": [none],
        "x1, one adapter": [only(0)],
        "x8, none": [none] * _CLIENTS,
        "x8, all the same": [only(0)] * _CLIENTS,
        "x8, eight different": [only(which) for which in range(_CLIENTS)],
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    with Server(command, port) as server:
        for turn in range(max(rounds // 3, 2) + 1):
            for name, clients in kinds.items():
                rate = asyncio.run(_rate(server.url, clients, turn))
                if turn:
                    rates[name].append(rate)
    medians = {name: percentile(found, 0.5) for name, found in rates.items()}
    return [
        {
            "what": name,
            "tokens_per_s": round(rate, 1),
            "ratio": round(medians[f"{name.partition(',')[0]}, none"] / rate, 3),
        }
        for name, rate in medians.items()
    ]


async def _rate(url: str, clients: Sequence[Any], seed: int) -> float:
    """Return tokens/s of all clients together, excluding the prompt time if there is one client."""
    begun = time.perf_counter()
    answers = await asyncio.gather(
        *(asyncio.to_thread(_complete, url, lora, seed * 100 + index) for index, lora in enumerate(clients))
    )
    if len(clients) == 1:
        return float(answers[0]["timings"]["predicted_per_second"])
    prompts_s = sum(answer["timings"]["prompt_ms"] for answer in answers) / len(answers) / 1e3
    taken_s = time.perf_counter() - begun
    num_tokens = sum(int(answer["tokens_predicted"]) for answer in answers)
    return num_tokens / float(max(taken_s - prompts_s, 1e-9))


def _complete(url: str, lora: Any, seed: int) -> dict[str, Any]:
    body = {
        "prompt": [100 + (seed * 7919 + index * 104729) % 30000 for index in range(_PROMPT)],
        "n_predict": _TOKENS, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False, "lora": lora,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        answer: dict[str, Any] = json.load(response)
    return answer
