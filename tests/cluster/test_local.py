"""A cluster as its clients see it, with replicas in this process: Ray carries the same calls."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest

from tests.support.asgi import Call, events_of, request, send
from tests.support.local_cluster import LocalCluster, LocalTransport
from tests.support.waiting import LONGEST_S, until
from tgi_asgi.cluster import ingress
from tgi_asgi.cluster.remote import ReplicaLost
from tgi_asgi.cluster.wire import CacheVersion, Description, split_digests
from tgi_asgi.errors import IncompleteGeneration, InvalidRequest
from tgi_asgi.settings import Settings
from tgi_asgi.types import (
    EngineState,
    GenerationRequest,
    ImageInput,
    SamplingParams,
    StopConditions,
    TokenEvent,
)

CHAT = "/v1/chat/completions"
KEYS = {"authorization": "Bearer a-key"}


def chat(content: str, **fields: Any) -> dict[str, Any]:
    return {
        "model": "toy/model",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        **fields,
    }


async def ask(cluster: LocalCluster, content: str, **fields: Any) -> Call:
    headers = fields.pop("headers", None)
    return await send(cluster.app, request("POST", CHAT, chat(content, **fields), headers))


async def test_an_answer_is_that_of_one_server() -> None:
    async with LocalCluster(2) as cluster:
        whole = (await ask(cluster, "hello there", max_tokens=20)).json()
        stream = events_of((await ask(cluster, "hello there", max_tokens=20, stream=True)).content)
    text = whole["choices"][0]["message"]["content"]
    assert len(text) == 20
    assert whole["usage"]["completion_tokens"] == 20
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in stream[:-1]) == text
    assert stream[-1] == "[DONE]"


async def test_the_ingress_hashes_prompts_as_the_engine_does() -> None:
    async with LocalCluster(1) as cluster:
        await ask(cluster, "x" * 100, max_tokens=1)
        [(_, wired)] = cluster.transport.sent
        digests = cluster.engine.digests(wired.request)
        report = await cluster.transport.call("r0", "report", CacheVersion())
    assert len(digests) >= 6
    assert set(digests) <= set(split_digests(report.found))


async def test_adapters_and_images_are_hashed_as_the_engine_does() -> None:
    settings = Settings(model_id="toy/model", lora_adapters=("sql=/adapters/sql",))
    async with LocalCluster(1, settings) as cluster:
        engine, served = cluster.engine, cluster.app.context.served
        assert served is not None and served.adapters is not None
        adapters = served.adapters
        await wait_for(lambda: "sql" in adapters, cluster)
        adapter = (await adapters.lease("sql")).adapter
        image = ImageInput(b"\1" * 32, 20, 30, None)
        ids = list(range(97, 97 + 26)) * 4
        known: set[bytes] = set()
        for with_adapter, images, salt in product((None, adapter), ((), (image,)), (None, "salt")):
            wanted = GenerationRequest(
                "id",
                ids,
                SamplingParams(temperature=0),
                StopConditions(1),
                adapter=with_adapter,
                images=images,
                cache_salt=salt,
            )
            digests = engine.digests(wanted)
            assert len(digests) == 6
            assert not known & set(digests[2:])  # all differ
            known |= set(digests)
            channel = engine.submit(wanted, engine.acquire(1))
            await wait_for(lambda: channel.stats.finished_s is not None, cluster)  # noqa: B023
        report = await cluster.transport.call("r0", "report", CacheVersion())
    assert known == set(split_digests(report.found))


async def test_adapters_come_and_go_on_all_replicas() -> None:
    settings = Settings(
        model_id="toy/model", enable_lora=True, admin_api_key="admin", strict_model_names=True
    )
    key = {"authorization": "Bearer admin"}
    async with LocalCluster(2, settings) as cluster:

        async def post(path: str, **body: object) -> Call:
            return await send(cluster.app, request("POST", path, body, key))

        loaded = await post("/v1/load_lora_adapter", lora_name="sql", lora_path="/adapters/sql")
        failed = await post("/v1/load_lora_adapter", lora_name="bad", lora_path="/missing")
        answer = await ask(cluster, "hi", model="sql", max_tokens=1)
        listed = (await send(cluster.app, request("GET", "/v1/models"))).json()
        again = {"lora_name": "sql", "load_inplace": True}
        replaced = await post("/v1/load_lora_adapter", lora_path="/adapters/new", **again)
        kept = await post("/v1/load_lora_adapter", lora_path="/missing", **again)
        still = await ask(cluster, "hi", model="sql", max_tokens=1)
        gone = await post("/v1/unload_lora_adapter", lora_name="sql")
        after = await ask(cluster, "hi", model="sql", max_tokens=1)
    assert (loaded.status, failed.status, gone.status, after.status) == (200, 400, 200, 404)
    assert (replaced.status, kept.status, still.status) == (200, 400, 200)
    assert answer.json()["model"] == "sql"
    assert [each["id"] for each in listed["data"]] == ["toy/model", "sql"]


async def test_a_name_that_is_added_twice_at_once_keeps_the_first_adapter() -> None:
    """As when a client retries a call that is still being served."""
    async with LocalCluster(2, Settings(model_id="toy/model", enable_lora=True)) as cluster:
        served = cluster.app.context.served
        assert served is not None and served.adapters is not None
        adapters = served.adapters
        calls = (adapters.add("sql", "/adapters/sql"), adapters.add("sql", "/adapters/other"))
        first, second = await asyncio.gather(*calls, return_exceptions=True)
        kept = [replica.adapters.keys() for replica in cluster.engine.table.replicas.values()]
    assert first is None
    assert isinstance(second, InvalidRequest)
    assert kept == [{"sql"}, {"sql"}]


class Panic(BaseException):
    """What a library written in Rust raises; it is not an `Exception`."""


@pytest.mark.parametrize("wrong", [MemoryError("400 MiB"), Panic(), None], ids=["memory", "panic", "answer"])
async def test_an_adapter_that_one_replica_cannot_read_stays_on_none_and_may_be_added_again(
    wrong: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a `wrong`, the replica reads it, and its answer does not arrive."""
    settings = Settings(model_id="toy/model", enable_lora=True, admin_api_key="admin")
    body = {"lora_name": "sql", "lora_path": "/adapters/sql"}
    call = LocalTransport.call

    def fail(source: object) -> None:
        assert wrong is not None
        raise wrong

    async def lose_answer(transport: LocalTransport, replica: str, method: str, *arguments: Any) -> Any:
        answer = await call(transport, replica, method, *arguments)
        if (replica, method) == ("r1", "add_adapter"):
            raise RuntimeError("an answer that cannot be read")
        return answer

    async with LocalCluster(2, settings) as cluster:

        async def add() -> Call:
            key = {"authorization": "Bearer admin"}
            return await send(cluster.app, request("POST", "/v1/load_lora_adapter", body, key))

        with monkeypatch.context() as patch:
            if wrong is not None:
                patch.setattr(cluster.transport.found["r1"]._adapters, "_load", fail)
            else:
                patch.setattr(LocalTransport, "call", lose_answer)
            failed = await add()
        left = [replica._adapters.names for replica in cluster.transport.found.values() if replica._adapters]
        again = await add()
        kept = [replica.adapters.keys() for replica in cluster.engine.table.replicas.values()]
    assert left == [[], []]
    assert failed.status == 500
    assert "log says why" in failed.json()["error"]["message"]
    assert again.status == 200
    assert kept == [{"sql"}, {"sql"}]


@pytest.mark.parametrize("wrong", [ValueError("why"), asyncio.CancelledError()], ids=["error", "cancelled"])
async def test_a_sink_that_raises_ends_its_own_request_alone_and_is_told(wrong: BaseException) -> None:
    told: list[Exception] = []

    class Sink:
        def on_events(self, events: Sequence[TokenEvent]) -> None:
            raise wrong

        def on_error(self, error: Exception) -> None:
            told.append(error)

    async with LocalCluster(1) as cluster:
        wanted = GenerationRequest("r", [1, 2], SamplingParams(), StopConditions(max_tokens=50))
        engine = cluster.engine
        engine.submit(wanted, engine.acquire(1)).attach(Sink())
        await wait_for(lambda: not engine.channels, cluster)
        assert engine.admission.num_taken == 0
        assert (await ask(cluster, "hello", max_tokens=3)).status == 200
    assert [type(error) for error in told] == [IncompleteGeneration]


async def test_a_replica_whose_report_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async with LocalCluster(2) as cluster:

        def fail(*_: object) -> None:
            raise RuntimeError("no report")

        await ask(cluster, "hello", max_tokens=7)
        [(used, _)] = cluster.transport.sent
        (unused,) = {"r0", "r1"} - {used}
        monkeypatch.setattr(cluster.transport.found[unused], "report", fail)
        await cluster.engine.refresh()
        assert cluster.engine.stats.sampled_tokens == cluster.engine_of(used).stats.sampled_tokens > 0
        assert cluster.engine.table.replicas[unused].num_missed == 1


async def wait_for(holds: Callable[[], bool], cluster: LocalCluster) -> None:
    async with asyncio.timeout(LONGEST_S):
        while not holds():
            await cluster.engine.refresh()
            await asyncio.sleep(0.001)


async def test_the_replica_gets_tokens_and_no_text() -> None:
    async with LocalCluster(1) as cluster:
        answer = await ask(cluster, "hello", max_tokens=2)
    [(_, wired)] = cluster.transport.sent
    assert len(wired.request.prompt_ids) == answer.json()["usage"]["prompt_tokens"]


async def test_a_conversation_stays_where_its_blocks_are() -> None:
    async with LocalCluster(3) as cluster:
        await asyncio.gather(*(ask(cluster, who * 60, max_tokens=1) for who in "abcdef"))
        for turn in range(2, 6):
            for who in "abcdef":  # one at a time, so that no other replica has an advantage
                await ask(cluster, who * 60 * turn, max_tokens=1)
        places: dict[str, set[str]] = {}
        for name, wired in cluster.transport.sent:
            text = bytes(i for i in wired.request.prompt_ids if i < 256)
            places.setdefault(chr(text[40]), set()).add(name)
    assert all(len(names) == 1 for names in places.values()), places
    assert len(set.union(*places.values())) == 3  # and the conversations are spread


async def test_keys_do_not_share_what_they_send() -> None:
    settings = Settings(model_id="toy/model", api_key=("a-key", "other"))
    async with LocalCluster(1, settings) as cluster:
        first = await ask(cluster, "z" * 200, max_tokens=1, headers=KEYS)
        again = await ask(cluster, "z" * 200, max_tokens=1, headers=KEYS)
        other = await ask(cluster, "z" * 200, max_tokens=1, headers={"authorization": "Bearer other"})
        none = await ask(cluster, "z" * 200, max_tokens=1)

    def cached(call: Call) -> int:
        return int((call.json()["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0))

    assert (cached(first), cached(other)) == (0, 0)
    assert cached(again) >= 192
    assert none.status == 401
    assert none.json()["error"]["code"] == "invalid_api_key"


async def test_a_lost_replica_fails_only_its_own_streams() -> None:
    async with LocalCluster(2, step_s=0.005) as cluster:
        calls = [
            request("POST", CHAT, chat(chr(97 + i) * 100, max_tokens=200, ignore_eos=True, stream=True))
            for i in range(8)
        ]
        tasks = [asyncio.create_task(send(cluster.app, call, 30)) for call in calls]
        await asyncio.gather(*(asyncio.wait_for(call.got_frame.wait(), LONGEST_S) for call in calls))
        doomed = {wired.request.request_id for name, wired in cluster.transport.sent if name == "r0"}
        assert 0 < len(doomed) < 8
        cluster.kill("r0")
        await asyncio.gather(*tasks)
        after = await ask(cluster, "still there", max_tokens=3)
    for call in calls:
        events = events_of(call.content)
        if call.headers["x-request-id"] in doomed:
            assert events[-2]["error"]["type"] == "server_error"
            assert "replica" in events[-2]["error"]["message"]
            assert events[-1] == "[DONE]"
        else:
            assert events[-2]["choices"][0]["finish_reason"] == "length" or events[-2].get("usage")
    assert after.status == 200


async def test_what_has_no_token_yet_goes_to_another_replica() -> None:
    async with LocalCluster(2) as cluster:
        engine = cluster.engine
        best = engine.table.order([], 10)[0]
        del cluster.transport.found[best]  # lost, and not reported yet
        answers = await asyncio.gather(*(ask(cluster, "hello", max_tokens=3) for _ in range(4)))
    assert [call.status for call in answers] == [200] * 4


async def test_without_replicas_requests_are_told_to_come_back() -> None:
    async with LocalCluster(1) as cluster:
        cluster.kill("r0")
        await cluster.engine.refresh()
        health = await send(cluster.app, request("GET", "/health"))
        answer = await ask(cluster, "hello")
    assert (health.status, answer.status) == (503, 503)
    assert "retry-after" in answer.headers
    assert answer.json()["error"]["type"] == "server_error"


async def test_an_ingress_that_reaches_no_replica_tries_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the first replica ends while it describes the model."""
    errors = [ReplicaLost("r0"), RuntimeError("not deployed")]

    def connect() -> tuple[LocalTransport, Description]:
        if errors:
            raise errors.pop()
        return cluster.transport, cluster.transport.found["r0"].describe()

    monkeypatch.setattr(ingress, "FIRST_PAUSE_S", 0.001)
    async with LocalCluster(1) as cluster:
        app = ingress.ingress_app(cluster.settings, connect)
        app.start()
        await until(lambda: app.context.state is EngineState.READY)
        health = await send(app, request("GET", "/health"))
        await app.stop()
    assert health.status == 200
    assert caplog.text.count("no replica could be asked") == 2


async def test_an_ingress_tries_again_less_and_less_often_until_it_stops() -> None:
    pauses: list[float] = []

    class Stopping(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            pauses.append(timeout)
            return len(pauses) == 8

    def connect() -> tuple[LocalTransport, Description]:
        raise ReplicaLost("r0")

    with pytest.raises(ReplicaLost):
        ingress._connect(connect, Stopping())
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    app = ingress.ingress_app(Settings(model_id="toy/model"), connect)
    await app.stop()
    assert app.has_stopped.is_set()


async def test_what_has_no_token_at_the_end_may_be_sent_to_another_server() -> None:
    async with LocalCluster(1, Settings(model_id="toy/model", max_batch_size=1), step_s=0.002) as cluster:
        asked = [asyncio.create_task(ask(cluster, "hello", max_tokens=900)) for _ in range(2)]
        await wait_for(
            lambda: [channel.has_begun for channel in cluster.engine.channels] == [True, False], cluster
        )
        await cluster.engine.drain(0.01)
        assert [answer.status for answer in await asyncio.gather(*asked)] == [500, 503]


async def test_a_client_that_leaves_frees_the_replica() -> None:
    async with LocalCluster(1, step_s=0.002) as cluster:
        call = request("POST", CHAT, chat("a" * 50, max_tokens=2000, ignore_eos=True, stream=True))
        task = asyncio.create_task(send(cluster.app, call))
        await asyncio.wait_for(call.got_frame.wait(), LONGEST_S)
        call.gone.set()
        await task
        engine = cluster.engine_of("r0")
        async with asyncio.timeout(LONGEST_S):
            while engine.stats.blocks_used or engine.stats.cancelled != 1:
                await asyncio.sleep(0.005)
        assert cluster.engine.channels == []
        assert cluster.engine.table.replicas["r0"].load == 0


async def test_a_full_cluster_says_so() -> None:
    settings = Settings(model_id="toy/model", max_concurrent_requests=1)
    async with LocalCluster(2, settings, step_s=0.005) as cluster:
        calls = [
            request("POST", CHAT, chat("a" * 50, max_tokens=400, ignore_eos=True, stream=True))
            for _ in range(2)
        ]
        tasks = [asyncio.create_task(send(cluster.app, call, 30)) for call in calls]
        await asyncio.gather(*(asyncio.wait_for(call.got_frame.wait(), LONGEST_S) for call in calls))
        refused = await ask(cluster, "one more")
        for call in calls:
            call.gone.set()
        await asyncio.gather(*tasks)
    assert {name for name, _ in cluster.transport.sent} == {"r0", "r1"}
    assert refused.status == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"


async def test_what_a_request_asks_for_survives_the_way() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    async with LocalCluster(1) as cluster:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = await ask(cluster, "hi", max_tokens=40, logprobs=True, top_logprobs=2, n=2, seed=3)
        refused = await ask(cluster, "hi", max_tokens=100_000)
        await ask(cluster, "hi", max_tokens=2, response_format=form)
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert len(choices[0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert refused.status == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert cluster.transport.sent[-1][1].grammar is not None


async def test_metrics_add_up_over_replicas_and_never_fall() -> None:
    async with LocalCluster(2) as cluster:
        await asyncio.gather(*(ask(cluster, who * 100, max_tokens=5) for who in "abcd"))

        async def generated() -> float:
            await cluster.engine.refresh()
            text = (await send(cluster.app, request("GET", "/metrics"))).content.decode()
            [line] = [line for line in text.splitlines() if line.startswith("tgi_generation_tokens_total ")]
            return float(line.split(" ")[1])

        before = await generated()
        cluster.kill("r0")
        after = await generated()
    assert (before, after) == (20, 20)


async def test_a_replica_that_comes_takes_its_part() -> None:
    async with LocalCluster(1) as cluster:
        await cluster.start_replica("r1")
        await cluster.engine.refresh()
        await asyncio.gather(*(ask(cluster, who * 300, max_tokens=50) for who in "abcdef"))
        assert {name for name, _ in cluster.transport.sent} == {"r0", "r1"}


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/info", "/"])
async def test_the_other_routes_answer(path: str) -> None:
    async with LocalCluster(1) as cluster:
        assert (await send(cluster.app, request("GET", path))).status == 200


async def test_three_replicas_find_nearly_what_one_would() -> None:
    found = {}
    for count in (1, 3):
        rng = random.Random(7)
        plans = [["".join(rng.choices("abcdefgh ", k=60)) for _ in range(6)] for _ in range(12)]
        async with LocalCluster(count) as cluster:

            async def hold(cluster: LocalCluster, plan: list[str]) -> int:
                messages, cached = [{"role": "system", "content": "s" * 200}], 0
                for question in plan:
                    messages.append({"role": "user", "content": question})
                    answer = (await ask(cluster, "", messages=messages, max_tokens=8)).json()
                    cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                    messages.append(answer["choices"][0]["message"])
                return cached

            found[count] = sum(await asyncio.gather(*(hold(cluster, plan) for plan in plans)))
            assert len({name for name, _ in cluster.transport.sent}) == count
    assert found[3] >= 0.85 * found[1], found
