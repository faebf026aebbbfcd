"""Embeddings over sockets, from a tiny model: each API's options, against the results of `transformers`."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import numpy as np
import ollama
import openai
import pytest
import pytest_asyncio
import torch

from tests.support.pooling_models import EOS, pooled, save_embedder, states
from tests.support.pooling_server import PooledServer, pooled_server
from tests.support.waiting import until
from tgi_asgi.engine.engine import Engine
from tgi_asgi.text.tokenizer import Tokenizer

TEXTS = ["short", "a-much-longer-text-" * 8, "another", "x"]
pytestmark = pytest.mark.asyncio(loop_scope="module")
# For what does not depend on how a text's tokens become a vector.
ONE_EMBEDDER = pytest.mark.parametrize("embedder", ["lasttoken"], indirect=True)


class Embedder:
    """The checkpoint and its expected vectors."""

    def __init__(self, directory: Path, mode: str, **options: Any) -> None:
        self.directory, self.mode = directory, mode
        self.model = save_embedder(directory, mode, **options)
        self.tokenizer = Tokenizer.from_directory(directory)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=True)

    def expected(self, text: str | list[int], dimensions: int | None = None) -> np.ndarray:
        ids = self.ids(text) if isinstance(text, str) else text
        vector = pooled(states(self.model, ids), self.mode)[:dimensions]
        return np.asarray(torch.nn.functional.normalize(vector, dim=0))


@pytest.fixture(scope="module", params=["lasttoken", "mean_tokens"])
def embedder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    directory = tmp_path_factory.mktemp(request.param)
    return Embedder(directory, request.param, prompts={"query": "find-", "empty": ""})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(embedder: Embedder) -> AsyncIterator[PooledServer]:
    async with pooled_server(embedder.directory) as found:
        yield found


def sdk(server: PooledServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="-", max_retries=0)


async def test_openais_sdk_gets_the_vectors_of_transformers(embedder: Embedder, server: PooledServer) -> None:
    async with sdk(server) as client:
        answer = await client.embeddings.create(model="tiny", input=TEXTS)  # the SDK asks for base64
        plain = await client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    for found in (answer, plain):
        assert [each.index for each in found.data] == [0, 1, 2, 3]
        for text, each in zip(TEXTS, found.data, strict=True):
            np.testing.assert_allclose(each.embedding, embedder.expected(text), atol=1e-4)
    first, second = (np.array(each.data[0].embedding, np.float32) for each in (answer, plain))
    np.testing.assert_array_equal(first, second)
    count = sum(len(embedder.ids(text)) for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (count, count)
    assert answer.model == "tiny"
    assert embedder.ids("x")[-1] == EOS


async def test_ids_are_embedded_as_they_are(embedder: Embedder, server: PooledServer) -> None:
    async with sdk(server) as client:
        one = await client.embeddings.create(model="tiny", input=[7, 8, 9])
        several = await client.embeddings.create(model="tiny", input=[[7, 8, 9], [4]])
        bare = await client.embeddings.create(
            model="tiny", input="text", extra_body={"add_special_tokens": False}
        )
    assert one.data[0].embedding == several.data[0].embedding
    np.testing.assert_allclose(one.data[0].embedding, embedder.expected([7, 8, 9]), atol=1e-4)
    np.testing.assert_allclose(several.data[1].embedding, embedder.expected([4]), atol=1e-4)
    assert one.usage.prompt_tokens == 3
    ids = embedder.tokenizer.encode("text", add_special_tokens=False)
    np.testing.assert_allclose(bare.data[0].embedding, embedder.expected(ids), atol=1e-4)


async def test_fewer_dimensions_have_length_one_again(embedder: Embedder, server: PooledServer) -> None:
    async with sdk(server) as client:
        answer = await client.embeddings.create(model="tiny", input="cut", dimensions=10)
        assert len(answer.data[0].embedding) == 10
        np.testing.assert_allclose(answer.data[0].embedding, embedder.expected("cut", 10), atol=1e-4)
        raw = await client.embeddings.create(
            model="tiny", input="cut", dimensions=10, extra_body={"normalize": False}
        )
        wanted = pooled(states(embedder.model, embedder.ids("cut")), embedder.mode)[:10]
        np.testing.assert_allclose(raw.data[0].embedding, wanted, atol=1e-4 * float(wanted.abs().max()))
        newer = await client.embeddings.create(  # vLLM's newer name for `normalize`
            model="tiny", input="cut", dimensions=10, extra_body={"use_activation": False}
        )
        assert newer.data[0].embedding == raw.data[0].embedding
        with pytest.raises(openai.BadRequestError) as caught:
            await client.embeddings.create(model="tiny", input="cut", dimensions=65)
    assert caught.value.param == "dimensions"


async def test_base64_is_little_endian_float32(embedder: Embedder, server: PooledServer) -> None:
    answer = await server.post("/v1/embeddings", input="text", encoding_format="base64")
    found = np.frombuffer(base64.b64decode(answer.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(found, embedder.expected("text"), atol=1e-4)


@ONE_EMBEDDER
@pytest.mark.parametrize("field", [{"embed_dtype": "float16"}, {"endianness": "big"}])
async def test_numbers_of_another_form_are_refused(server: PooledServer, field: dict[str, str]) -> None:
    answer = await server.post("/v1/embeddings", input="text", encoding_format="base64", **field)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(field)))
    same = {"embed_dtype": "float32", "endianness": "little"}
    assert (await server.post("/v1/embeddings", input="text", **same)).status_code == 200


async def test_vllms_side_says_which_end_of_an_input_is_cut(embedder: Embedder, server: PooledServer) -> None:
    ids = embedder.tokenizer.encode("abcdefgh", add_special_tokens=False)
    for side, kept in (("right", ids[:4]), ("left", ids[-4:])):
        answer = await server.post(
            "/v1/embeddings", input="abcdefgh", truncate_prompt_tokens=5, truncation_side=side
        )
        found = answer.json()["data"][0]["embedding"]
        np.testing.assert_allclose(found, embedder.expected([*kept, EOS]), atol=1e-4)


async def test_cut_inputs_keep_what_the_tokenizer_adds(embedder: Embedder, server: PooledServer) -> None:
    ids = embedder.tokenizer.encode("abcdefgh", add_special_tokens=False)
    answer = await server.post("/v1/embeddings", input="abcdefgh", truncate_prompt_tokens=5)
    assert answer.json()["usage"]["prompt_tokens"] == 5
    found = answer.json()["data"][0]["embedding"]
    np.testing.assert_allclose(found, embedder.expected([*ids[:4], EOS]), atol=1e-4)
    for body, expected in (
        ({"truncate_prompt_tokens": -1}, 512),
        ({"truncate_prompt_tokens": 4000}, 512),
    ):
        answer = await server.post("/v1/embeddings", input="y" * 3000, **body)
        assert answer.json()["usage"]["prompt_tokens"] == expected


async def test_vectors_do_not_depend_on_what_runs_beside_them(embedder: Embedder, tmp_path: Path) -> None:
    other = Embedder(tmp_path, embedder.mode, is_bare=False)
    (tmp_path / "modules.json").unlink()  # the model can also generate
    kind = {"lasttoken": "last", "mean_tokens": "mean"}[embedder.mode]
    async with pooled_server(tmp_path, pooling=kind, max_concurrent_requests=32) as server:
        alone = [(await server.post("/v1/embeddings", input=text)).json() for text in TEXTS]

        async def stream() -> int:
            body = {"prompt": "go", "max_tokens": 60, "stream": True, "temperature": 0, "ignore_eos": True}
            async with server.http.stream("POST", "/v1/completions", json=body) as answer:
                return sum([line.startswith("data: {") async for line in answer.aiter_lines()])

        streams = [asyncio.create_task(stream()) for _ in range(4)]
        batches = await asyncio.gather(
            *(server.post("/v1/embeddings", input=TEXTS * 6) for _ in range(2)),
        )
        assert all([await each > 5 for each in streams])
    for batch in batches:
        entries = batch.json()["data"]
        assert len(entries) == 24
        for index, entry in enumerate(entries):
            assert entry["index"] == index
            assert entry["embedding"] == alone[index % 4]["data"][0]["embedding"]
    np.testing.assert_allclose(entries[1]["embedding"], other.expected(TEXTS[1]), atol=1e-4)


@ONE_EMBEDDER
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[1], []]}, "input[1]"),
        ({"input": [1, 160]}, "input[1]"),
        ({"input": [[1], [-1]]}, "input[1][0]"),
        ({"input": [True]}, "input[0]"),
        ({"input": ["a", 1]}, "input[1]"),
        ({"input": {"a": 1}}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 1 << 40}, "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "cache_salt": ""}, "cache_salt"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "y" * 512}, "input"),
        ({"input": ["a", "y" * 600]}, "input[1]"),
        ({"input": [[1] * 513]}, "input[0]"),
    ],
)
async def test_what_is_wrong_is_named(server: PooledServer, body: dict[str, Any], param: str) -> None:
    answer = await server.post("/v1/embeddings", **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert server.app.context.served is not None
    assert server.app.context.served.engine.describe()["requests"] == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "y" * 100}),
        ("/score", {"text_1": "y" * 100, "text_2": "a"}),
        ("/rerank", {"query": "y" * 100, "documents": ["a"]}),
    ],
)
async def test_prompts_with_other_salts_share_no_cached_prefix(
    tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    Embedder(tmp_path, "lasttoken")
    async with pooled_server(tmp_path) as server:
        hits = []
        for salt in ("mine", "yours", "mine"):
            assert (await server.post(path, **body, cache_salt=salt)).status_code == 200
            lines = (await server.http.get("/metrics")).text.splitlines()
            hits += [line for line in lines if line.startswith("tgi_prefix_cache_hit_tokens_total ")]
    assert hits[0] == hits[1] != hits[2]


@ONE_EMBEDDER
async def test_a_thousand_inputs_run_a_few_at_a_time(embedder: Embedder) -> None:
    async with pooled_server(embedder.directory, max_concurrent_requests=8) as server:
        answer = await server.post("/v1/embeddings", input=["a", "bc"] * 200, encoding_format="base64")
        entries = answer.json()["data"]
        assert len(entries) == 400
        assert len({entry["embedding"] for entry in entries}) == 2
        metrics = (await server.http.get("/metrics")).text
        assert "tgi_request_success 1" in metrics


@ONE_EMBEDDER
async def test_a_full_server_says_so_at_once(embedder: Embedder) -> None:
    async with pooled_server(embedder.directory, max_concurrent_requests=4) as server:
        assert server.app.context.served is not None
        engine = server.app.context.served.engine
        permit = engine.acquire(4)
        answer = await server.post("/v1/embeddings", input="a")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        permit.release()
        assert (await server.post("/v1/embeddings", input="a")).status_code == 200


@ONE_EMBEDDER
async def test_many_calls_with_many_inputs_share_the_room(embedder: Embedder) -> None:
    async with pooled_server(embedder.directory, max_concurrent_requests=8) as server:
        context = server.app.context
        assert context.served is not None
        engine = context.served.engine
        texts = [[f"{call}-{index}" + "y" * 100 for index in range(64)] for call in range(7)]
        calls = [asyncio.create_task(server.post("/embed", inputs=each)) for each in texts]
        await until(lambda: context.num_pool_calls == 7)
        begun = engine.describe()["counters"]["steps"]
        # What calls had running before the others came ends in these steps; from then on, each has one.
        await until(lambda: engine.describe()["counters"]["steps"] > begun + 30)
        assert (await server.post("/embed", inputs="a short one")).status_code == 200
        assert not any(call.done() for call in calls)
        answers = [await call for call in calls]
        assert [(answer.status_code, len(answer.json())) for answer in answers] == [(200, 64)] * 7
        assert context.num_pool_calls == 0
        alone = asyncio.create_task(server.post("/embed", inputs=texts[0]))
        await until(lambda: len(engine.describe()["requests"]) == 2)
        assert (await alone).status_code == 200


@ONE_EMBEDDER
async def test_a_call_with_much_text_needs_more_room(embedder: Embedder) -> None:
    async with pooled_server(embedder.directory, max_concurrent_requests=16) as server:
        assert server.app.context.served is not None
        permit = server.app.context.served.engine.acquire(14)
        few, many = ["y" * 40] * 64, ["y" * 10] * 400
        assert (await server.post("/embed", inputs=few)).status_code == 200
        for inputs in ([[1] * 400] * 400, ["y" * 400] * 400, many):
            assert (await server.post("/embed", inputs=inputs)).status_code == 429
        permit.release()
        assert (await server.post("/embed", inputs=many)).status_code == 200


@ONE_EMBEDDER
async def test_a_call_that_is_aborted_or_left_frees_its_room(embedder: Embedder) -> None:
    async with pooled_server(embedder.directory, max_concurrent_requests=8) as server:
        body, named = {"input": ["y" * 400] * 400}, {"x-request-id": "long"}
        request = asyncio.create_task(server.http.post("/v1/embeddings", json=body, headers=named))
        assert server.app.context.served is not None
        engine = cast(Engine, server.app.context.served.engine)
        await until(lambda: bool(engine.describe()["requests"]))
        assert engine.abort("long")
        answer = await request
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "request_aborted")
        request = asyncio.create_task(server.post("/v1/embeddings", **body))
        await until(lambda: bool(engine.describe()["requests"]))
        request.cancel()
        await until(lambda: not engine.describe()["requests"])
        engine.acquire(8).release()


@ONE_EMBEDDER
async def test_an_accepted_call_is_finished_while_the_server_drains(embedder: Embedder) -> None:
    async with pooled_server(embedder.directory, max_concurrent_requests=8) as server:
        call = asyncio.create_task(server.post("/v1/embeddings", input=["y" * 40] * 400))
        assert server.app.context.served is not None
        engine = cast(Engine, server.app.context.served.engine)
        await until(lambda: bool(engine.describe()["requests"]))
        draining = asyncio.create_task(engine.drain(60))
        await asyncio.sleep(0)
        assert (await server.post("/v1/embeddings", input="late")).status_code == 503
        assert not call.done() and not draining.done()
        assert len((await call).json()["data"]) == 400
        await draining


@ONE_EMBEDDER
async def test_keys_are_asked_for(embedder: Embedder) -> None:
    async with pooled_server(embedder.directory, api_key=("right",)) as server:
        for path in ("/v1/embeddings", "/embed", "/api/embed", "/rerank", "/score"):
            assert (await server.post(path, input="a")).status_code == 401
        answer = await server.http.post(
            "/v1/embeddings", json={"input": "a"}, headers={"authorization": "Bearer right"}
        )
        assert answer.status_code == 200


@ONE_EMBEDDER
async def test_a_model_that_embeds_does_not_generate(server: PooledServer) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        answer = await server.post(path, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_supported")
    answer = await server.post("/generate", inputs="a")
    assert (answer.status_code, answer.json()["error_type"]) == (400, "model_not_supported")


async def test_a_model_that_cannot_embed_says_what_would_help(tmp_path: Path) -> None:
    save_embedder(tmp_path, None, is_bare=False)
    async with pooled_server(tmp_path) as server:
        for path, body in (
            ("/v1/embeddings", {"input": "a"}),
            ("/rerank", {"query": "a", "documents": ["b"]}),
            ("/score", {"text_1": "a", "text_2": "b"}),
        ):
            answer = await server.post(path, **body)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "model_not_supported"
            assert "--pooling" in answer.json()["error"]["message"]
        answer = await server.post("/embed", inputs="a")
        assert (answer.status_code, answer.json()["error_type"]) == (424, "Backend")
        answer = await server.post("/api/embed", input="a")
        assert (answer.status_code, list(answer.json())) == (400, ["error"])


async def test_tei_answers_a_plain_array(embedder: Embedder, server: PooledServer) -> None:
    answer = await server.post("/embed", inputs=["one", "two"])
    for text, vector in zip(("one", "two"), answer.json(), strict=True):
        np.testing.assert_allclose(vector, embedder.expected(text), atol=1e-4)
    [asked] = (await server.post("/embed", inputs="one", prompt_name="query")).json()
    np.testing.assert_allclose(asked, embedder.expected("find-one"), atol=1e-4)
    [plain] = (await server.post("/embed", inputs="one", prompt_name="empty")).json()
    assert plain == answer.json()[0]
    [raw] = (await server.post("/embed", inputs="one", normalize=False)).json()
    raw_expected = pooled(states(embedder.model, embedder.ids("one")), embedder.mode)
    np.testing.assert_allclose(raw, raw_expected, atol=1e-4 * float(raw_expected.abs().max()))
    [short] = (await server.post("/embed", inputs="one", normalize=False, dimensions=4)).json()
    assert short == raw[:4]
    assert len((await server.post("/embed", inputs=[1, 2, 3])).json()) == 1
    assert len((await server.post("/embed", inputs="one", dimensions=4)).json()[0]) == 4


@ONE_EMBEDDER
async def test_tei_s_statuses(server: PooledServer) -> None:
    long = "y" * 600
    for body, status in (
        ({"inputs": long}, 413),
        ({"inputs": long, "truncate": True}, 200),
        ({"inputs": long, "truncate": True, "truncation_direction": "Left"}, 200),
        ({"inputs": ["a"] * 2049}, 413),
        ({"inputs": ""}, 422),
        ({"inputs": []}, 422),
        ({"inputs": "a", "prompt_name": "nobody"}, 422),
        ({"inputs": "a", "dimensions": 1000}, 422),
        ({}, 422),
    ):
        answer = await server.post("/embed", **body)
        assert answer.status_code == status, answer.text
        assert status == 200 or list(answer.json()) == ["error", "error_type"]
    named = (await server.post("/embed", inputs=[long])).json()["error"]
    assert "`inputs[0]`" in named
    assert (await server.http.post("/embed", content=b'{"inputs": "a"}')).status_code == 415


async def test_the_left_side_is_cut_where_that_is_asked_for(embedder: Embedder, server: PooledServer) -> None:
    text = "y" * 600 + "z"
    ids = embedder.tokenizer.encode(text, add_special_tokens=False)
    body = {"inputs": text, "truncate": True, "truncation_direction": "left"}
    [left] = (await server.post("/embed", **body)).json()
    np.testing.assert_allclose(left, embedder.expected([*ids[-511:], EOS]), atol=1e-4)


async def test_huggingface_hub_extracts_features(embedder: Embedder, server: PooledServer) -> None:
    def call() -> Any:
        for url in (server.url, server.url + "/embed"):  # TEI also answers at its root
            with_url = huggingface_hub.InferenceClient(model=url)
            yield with_url.feature_extraction(
                "one", normalize=True, truncate=True, truncation_direction="right"
            )

    for found in await asyncio.to_thread(lambda: list(call())):
        np.testing.assert_allclose(found[0], embedder.expected("one"), atol=1e-4)


async def test_ollamas_client_embeds(embedder: Embedder, server: PooledServer) -> None:
    client = ollama.AsyncClient(host=server.url)
    await _embed_with(client, embedder)
    await client._client.aclose()


async def _embed_with(client: ollama.AsyncClient, embedder: Embedder) -> None:
    answer = await client.embed(model="tiny", input=["one", "two"], truncate=True, keep_alive="5m")
    np.testing.assert_allclose(answer.embeddings[1], embedder.expected("two"), atol=1e-4)
    assert answer.prompt_eval_count == 8
    assert answer.total_duration is not None and answer.load_duration is not None
    assert 0 < answer.load_duration <= answer.total_duration
    assert len((await client.embed("tiny", "one", dimensions=5)).embeddings[0]) == 5
    with pytest.raises(ollama.ResponseError, match=r"`input\[1\]` must not be empty"):
        await client.embed("tiny", ["one", ""])
    with pytest.raises(ollama.ResponseError, match=r"`dimensions` must be in 1\.\.64"):
        await client.embed("tiny", "one", dimensions=65)
    old = await client.embeddings(model="tiny", prompt="one")
    np.testing.assert_allclose(old.embedding, embedder.expected("one"), atol=1e-4)
    assert list((await client.embed("tiny", "")).embeddings) == []
    assert list((await client.embeddings("tiny", "")).embedding) == []
    long = "y" * 600
    assert (await client.embed("tiny", long)).prompt_eval_count == 512
    with pytest.raises(ollama.ResponseError, match="maximum context"):
        await client.embed("tiny", long, truncate=False)
    assert "embedding" in ((await client.show("tiny")).capabilities or ())


@ONE_EMBEDDER
@pytest.mark.parametrize(("path", "field"), [("/api/embed", "input"), ("/api/embeddings", "prompt")])
async def test_ollamas_tag_is_no_other_model(server: PooledServer, path: str, field: str) -> None:
    assert server.app.context.served is not None
    name = server.app.context.served.info.model_id
    answer = await server.post(path, **{"model": f"{name}:latest", field: "hi"})
    assert answer.status_code == 200 and "x-tgi-model" not in answer.headers


@ONE_EMBEDDER
async def test_the_paths_of_a_list_s_texts_have_their_index(server: PooledServer) -> None:
    long = "y" * 600
    one = await server.post("/api/embed", input=[long], truncate=False)
    assert (one.status_code, "`input[0]`" in one.json()["error"]) == (400, True)
    bodies = {"text_2[0]": {"text_1": "a", "text_2": [long]}, "text_1[0]": {"text_1": [""], "text_2": "a"}}
    for param, body in bodies.items():
        answer = await server.post("/score", **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_cosines_stand_in_for_scores(embedder: Embedder, server: PooledServer) -> None:
    a, *others = (embedder.expected(text) for text in ("query", "one", "two", "three"))
    cosines = [float(a @ other) for other in others]
    answer = (await server.post("/score", text_1="query", text_2=["one", "two", "three"])).json()
    np.testing.assert_allclose([each["score"] for each in answer["data"]], cosines, atol=1e-4)
    answer = (await server.post("/rerank", query="query", documents=["one", "two", "three"])).json()
    for result in answer["results"]:
        assert result["relevance_score"] == pytest.approx(cosines[result["index"]], abs=1e-4)
