"""Adapters that are loaded and unloaded for long while others decode: same answers, no memory growth."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import httpx
import pytest

from tests.soak.client import Streaming, ask, until_idle
from tests.soak.conftest import Serve
from tests.support.adapters import write_adapter
from tests.support.memory import resident_bytes
from tests.support.scale import Scale
from tests.support.server_process import ServerProcess

_ROOT = {"authorization": "Bearer root"}
_NUM_STREAMS = 6
# Of the demonstration model.
_SHAPES = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip


def _write(folder: Path, rank: int) -> Path:
    shapes = {
        f"base_model.model.model.layers.{layer}.{name}": shape
        for layer in range(30)
        for name, shape in _SHAPES.items()
    }
    return write_adapter(folder, shapes, rank, lora_alpha=1)


def _body(model: str, number: int) -> dict[str, object]:
    return {"model": model, "prompt": f"Number {number} of", "max_tokens": 12, "temperature": 0}


@pytest.mark.demo
async def test_adapters_that_come_and_go_change_no_answer_and_leave_nothing(
    serve: Serve, scale: Scale, tmp_path: Path
) -> None:
    seconds, max_turns = scale((60.0, 6), (240.0, 10**9))
    folders = [await asyncio.to_thread(_write, tmp_path / str(rank), rank) for rank in (4, 8, 16)]
    server = serve(
        "--lora-modules", f"a={folders[0]} b={folders[1]}", "--admin-api-key", "root",
        "--max-loras", "2", "--max-cpu-loras", "3", "--max-batch-total-tokens", "2048", is_real=True,
    )  # fmt: skip
    alone: dict[tuple[str, int], str] = {}
    async with httpx.AsyncClient(base_url=server.url, timeout=60, verify=False) as client:
        await _until_listed(client, {"a", "b"})
        names = ["demo", "a", "b"]
        for name in names:
            for number in range(3):
                answer = await ask(server.port, _body(name, number))
                alone[name, number] = answer.texts[0]
        assert len({alone[name, 0] for name in names}) == 3
        until_s = time.monotonic() + seconds
        is_over = asyncio.Event()
        streams = [asyncio.create_task(_stream(server, alone, is_over, seed)) for seed in range(_NUM_STREAMS)]
        memory: list[int] = []
        for turn in range(max_turns):
            if time.monotonic() > until_s:
                break
            name = f"turn {turn}"
            given = {"lora_name": name, "lora_path": str(folders[turn % 3])}
            loaded = await client.post("/v1/load_lora_adapter", json=given, headers=_ROOT)
            if loaded.status_code == 429:  # all three places are in use
                continue
            assert loaded.status_code == 200, loaded.text
            answer = await ask(server.port, _body(name, turn % 3))
            if turn % 3 < 2:
                assert answer.texts[0] == alone["ab"[turn % 3], turn % 3]
            gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": name}, headers=_ROOT)
            assert gone.status_code == 200, gone.text
            memory.append(resident_bytes(server.process.pid))
        is_over.set()
        num_compared = sum(await asyncio.gather(*streams))
    counters = (await until_idle(server))["counters"]
    assert num_compared > 0 and memory
    assert counters["failed"] == counters["failed_steps"] == 0
    if scale.is_full:
        # The least of many turns, because a single one may hold an adapter more (10 MB).
        fifth = len(memory) // 5
        early, late = min(memory[fifth : 2 * fifth]), min(memory[-fifth:])
        # The allocator may come to keep a buffer (16 MB); an adapter lost in a hundred turns would be 90 MB.
        assert abs(late - early) <= 0.1 * early, f"{early} bytes became {late} in {len(memory)} turns"


async def _until_listed(client: httpx.AsyncClient, names: set[str]) -> None:
    async with asyncio.timeout(60):
        while not names <= {model["id"] for model in (await client.get("/v1/models")).json()["data"]}:
            await asyncio.sleep(0.05)


async def _stream(
    server: ServerProcess, alone: dict[tuple[str, int], str], is_over: asyncio.Event, seed: int
) -> int:
    """Repeat requests whose answers are known until `is_over`; return how many answers were compared."""
    rng, count = random.Random(seed), 0
    while not is_over.is_set():
        name, number = rng.choice(list(alone))
        client = await (await Streaming.start(server.port, _body(name, number))).finish()
        if client.status == 429:  # all adapters that fit into memory are in use
            await asyncio.sleep(0.05)
            continue
        assert client.status == 200
        assert client.texts == {0: alone[name, number]}
        count += 1
    return count
