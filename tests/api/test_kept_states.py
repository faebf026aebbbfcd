"""Kept states of a tiny model with recurrent layers, as clients and administrators see them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.family_files import checkpoint
from tests.support.family_states import STATE_CASES
from tests.support.pooling_server import PooledServer, pooled_server

LFM2 = STATE_CASES[0]
PROMPT = [3 + number * 5 % 90 for number in range(40)]


async def complete(server: PooledServer, prompt: list[int], **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "temperature": 0, "max_tokens": 30, "return_token_ids": True, **fields}
    answer = await server.post("/v1/completions", prompt=prompt, ignore_eos=True, **body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def cached(answer: dict[str, Any]) -> int:
    number: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return number


@pytest.mark.parametrize(
    ("speculate", "model_impl"),
    [
        (0, "native"),
        (4, "native"),
        (0, "transformers"),
        pytest.param(4, "transformers", marks=pytest.mark.models),
    ],
)
async def test_the_second_turn_of_a_conversation_is_found_up_to_the_answers_end(
    speculate: int, model_impl: str
) -> None:
    settings = {
        "model_impl": model_impl,
        "max_total_tokens": 200,
        "max_kept_states": 20,
        "speculate": speculate,
        "debug_endpoints": True,
    }
    async with pooled_server(checkpoint(LFM2).path, **settings) as server:
        first = await complete(server, PROMPT)
        assert cached(first) == 0
        turn = [*PROMPT, *first["choices"][0]["token_ids"], 7, 8, 9]
        assert len(turn) == 73
        second = await complete(server, turn)
        if not speculate:
            assert cached(second) == 64
        assert cached(second) >= 32
        other = await complete(server, PROMPT, n=3, cache_salt="other")
        assert cached(other) == 0
        for choice in other["choices"]:
            assert choice["token_ids"] == first["choices"][0]["token_ids"]
        metrics = (await server.http.get("/metrics")).text
        assert "\ntgi_kept_states 0\n" not in metrics and "\ntgi_kept_states " in metrics
        assert (await server.http.get("/info")).json()["max_kept_states"] == 20
        shown = (await server.http.get("/debug/engine")).json()["kept_states"]
        assert (shown["total"], shown["used"]) == (20, 0) and 0 < shown["findable"] <= 20
        # The state before the last token, for the other choices, is that after the last full block, too.
        await complete(server, PROMPT[:33], n=2, cache_salt="choices")
        beside = [*PROMPT[:32], 50, 60, 70, 80]
        salted = [await complete(server, beside, cache_salt=salt) for salt in ("choices", "alone")]
        assert [cached(each) for each in salted] == [32, 0]
        assert salted[0]["choices"][0]["token_ids"] == salted[1]["choices"][0]["token_ids"]
    settings["max_kept_states"] = 0
    async with pooled_server(checkpoint(LFM2).path, **settings) as server:
        again = await complete(server, turn)
        assert cached(again) == cached(await complete(server, turn)) == 0
        assert again["choices"][0]["token_ids"] == second["choices"][0]["token_ids"]
