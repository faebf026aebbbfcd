"""Stored responses: what later requests may continue, which key owns them, and how many are kept."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

from tests.support.client import client_of
from tests.support.scripted_engine import CHATML, ScriptedEngine, fail_with, say
from tests.support.tool_app import CALLS, CITY, app_of, sdk_of
from tgi_asgi.api.exchange import LARGE_BODY
from tgi_asgi.api.openai.response_store import ResponseStore, StoredResponse
from tgi_asgi.app import App
from tgi_asgi.errors import GenerationFailed
from tgi_asgi.settings import MIB, Settings

TOOLS: list[Any] = [{"type": "function", "name": "weather", "parameters": CITY}]
# A chat template that also shows calls and their results.
TEMPLATE = CHATML.replace(
    "+ message['content']", "+ (message['content'] or '') + (message['tool_calls'] | string if "
    "message['tool_calls'] else '')"
)  # fmt: skip


async def post(app: App, body: dict[str, Any], key: str = "-") -> httpx.Response:
    async with client_of(app) as client:
        return await client.post("/v1/responses", json=body, headers={"authorization": f"Bearer {key}"})


async def respond(app: App, said: Any, key: str = "-", **fields: Any) -> dict[str, Any]:
    answer = await post(app, {"input": said, **fields}, key)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def prompts(engine: ScriptedEngine) -> list[str]:
    return [
        engine.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False)
        for request in engine.requests
    ]


def chat(*turns: str) -> str:
    roles = ("user", "assistant")
    said = [f"<|im_start|>{roles[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns)]
    return "".join(said) + "<|im_start|>assistant\n"


async def test_a_conversation_goes_on_from_the_response_before() -> None:
    engine = ScriptedEngine(say("Hel", "lo"))
    async with sdk_of(app_of(engine)) as client:
        first = await client.responses.create(model="m", input="one", instructions="Be brief.")
        second = await client.responses.create(model="m", input="two", previous_response_id=first.id)
        third = await client.responses.create(
            model="m", input=[{"role": "user", "content": "three"}], previous_response_id=second.id
        )
    assert (second.previous_response_id, third.previous_response_id) == (first.id, second.id)
    # As in OpenAI's API, instructions are not carried over.
    assert prompts(engine)[1:] == [chat("one", "Hello", "two"), chat("one", "Hello", "two", "Hello", "three")]


async def test_a_streamed_response_is_kept_as_well() -> None:
    engine = ScriptedEngine(say("Hel", "lo"))
    async with sdk_of(app_of(engine)) as client:
        async with client.responses.stream(model="m", input="one") as stream:
            first = await stream.get_final_response()
        await client.responses.create(model="m", input="two", previous_response_id=first.id)
        kept = await client.responses.retrieve(first.id)
    assert prompts(engine)[1] == chat("one", "Hello", "two")
    assert (kept.id, kept.output_text, kept.status) == (first.id, "Hello", "completed")


async def test_what_background_responses_have_is_refused_by_name() -> None:
    async with sdk_of(app_of(ScriptedEngine(say("a")))) as client:
        made = await client.responses.create(model="m", input="one")
        with pytest.raises(openai.BadRequestError, match="only background responses") as finished:
            await client.responses.cancel(made.id)
        with pytest.raises(openai.BadRequestError, match="stream") as streamed:
            await client.responses.retrieve(made.id, stream=True)
        with pytest.raises(openai.NotFoundError, match="not found") as unknown:
            await client.responses.cancel("resp_1")
        assert (await client.responses.retrieve(made.id, stream=False)).id == made.id
    assert (finished.value.param, streamed.value.param) == ("id", "stream")
    assert unknown.value.code == "response_not_found"


async def test_calls_and_their_results_are_part_of_the_history() -> None:
    engine = ScriptedEngine(say(*CALLS[4:12]))
    app = app_of(engine, chat_template=TEMPLATE)
    first = await respond(app, "where?", tools=TOOLS)
    [call] = [item for item in first["output"] if item["type"] == "function_call"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    await respond(app, [result], previous_response_id=first["id"])
    later = prompts(engine)[1]
    assert later.index("where?") < later.index("Paris") < later.index("sunny")


async def test_items_are_referred_to_by_their_ids() -> None:
    engine = ScriptedEngine(say("Hello"))
    app = app_of(engine)
    first = await respond(app, "one")
    for reference in ({"type": "item_reference", "id": first["output"][0]["id"]},
                      {"id": first["output"][0]["id"]}):  # fmt: skip
        said = [{"role": "user", "content": "one"}, reference, {"role": "user", "content": "two"}]
        await respond(app, said)
    assert prompts(engine)[1:] == [chat("one", "Hello", "two")] * 2


async def test_what_an_item_referred_to_outlives_the_response_that_had_it() -> None:
    engine = ScriptedEngine(say("Hello"))
    app = app_of(engine)
    first = await respond(app, "one")
    second = await respond(app, [{"type": "item_reference", "id": first["output"][0]["id"]}])
    async with client_of(app) as client:
        await client.delete(f"/v1/responses/{first['id']}")
    await respond(app, "two", previous_response_id=second["id"])
    assert "Hello" in prompts(engine)[-1]


async def test_what_is_not_to_be_stored_is_not() -> None:
    app = app_of(ScriptedEngine())
    first = await respond(app, "one", store=False)
    assert first["store"] is False
    refused = await post(app, {"input": "two", "previous_response_id": first["id"]})
    assert refused.status_code == 400
    item = {"type": "item_reference", "id": first["output"][0]["id"]}
    assert (await post(app, {"input": [item]})).json()["error"]["param"] == "input[0].id"
    assert app.context.responses.size == 0


async def test_an_unknown_response_is_refused_by_name() -> None:
    async with sdk_of(app_of(ScriptedEngine())) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="m", input="hi", previous_response_id="resp_nobody")
        assert (caught.value.code, caught.value.param) == (
            "previous_response_not_found", "previous_response_id"
        )  # fmt: skip
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve("resp_nobody")
        with pytest.raises(openai.NotFoundError):
            await client.responses.delete("resp_nobody")


async def test_a_response_is_retrieved_as_it_was_and_forgotten() -> None:
    app = app_of(ScriptedEngine())
    first = await respond(app, "one", metadata={"a": "b"})
    async with client_of(app) as client:
        kept = await client.get(f"/v1/responses/{first['id']}")
        assert (kept.status_code, kept.json()) == (200, first)
        deleted = await client.delete(f"/v1/responses/{first['id']}")
        assert deleted.json() == {"id": first["id"], "object": "response", "deleted": True}
        for method in ("GET", "DELETE"):
            gone = await client.request(method, f"/v1/responses/{first['id']}")
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "response_not_found")
    assert (await post(app, {"input": "x", "previous_response_id": first["id"]})).status_code == 400
    reference = [{"type": "item_reference", "id": first["output"][0]["id"]}]
    assert (await post(app, {"input": reference})).status_code == 400
    assert app.context.responses.size == 0


async def test_what_went_before_outlives_the_response_that_had_it() -> None:
    engine = ScriptedEngine(say("Hello"))
    app = app_of(engine)
    first = await respond(app, "one")
    second = await respond(app, "two", previous_response_id=first["id"])
    async with client_of(app) as client:
        await client.delete(f"/v1/responses/{first['id']}")
    await respond(app, "three", previous_response_id=second["id"])
    assert prompts(engine)[-1] == chat("one", "Hello", "two", "Hello", "three")


async def test_nobody_finds_anothers_responses() -> None:
    app = app_of(ScriptedEngine(), Settings(api_key=("first", "second")))
    mine = await respond(app, "secret", "first")
    async with client_of(app) as client:
        for method in ("GET", "DELETE"):
            headers = {"authorization": "Bearer second"}
            answer = await client.request(method, f"/v1/responses/{mine['id']}", headers=headers)
            assert answer.status_code == 404
    for body in ({"input": "x", "previous_response_id": mine["id"]},
                 {"input": [{"type": "item_reference", "id": mine["output"][0]["id"]}]}):  # fmt: skip
        assert (await post(app, body, "second")).status_code == 400
        assert (await post(app, body, "first")).status_code == 200


async def test_a_failed_response_is_not_kept() -> None:
    app = app_of(ScriptedEngine(fail_with(GenerationFailed("broken"))))
    assert (await post(app, {"input": "one"})).status_code == 500
    await post(app, {"input": "one", "stream": True})
    assert app.context.responses.size == 0


async def test_only_so_many_responses_are_kept() -> None:
    app = app_of(ScriptedEngine(), Settings(response_store=2))
    ids = [(await respond(app, "one"))["id"] for _ in range(3)]
    async with client_of(app) as client:
        kept = [(await client.get(f"/v1/responses/{name}")).status_code for name in ids]
    assert kept == [404, 200, 200]


async def test_nothing_is_kept_where_the_administrator_says_so() -> None:
    app = app_of(ScriptedEngine(), Settings(response_store=0))
    first = await respond(app, "one")
    assert (await post(app, {"input": "x", "previous_response_id": first["id"]})).status_code == 400


async def test_numbers_beyond_64_bits_are_kept_as_they_were_written() -> None:
    app = app_of(ScriptedEngine())
    item = {"role": "user", "content": "one", "more": 10**40}
    first = await respond(app, [item])
    await respond(app, "two", previous_response_id=first["id"])


async def test_what_was_said_in_a_thread_is_read_again_wherever_that_is() -> None:
    """A thread's stack allows deeper recursion than the event loop's."""
    app = app_of(ScriptedEngine(say("a")))
    async with client_of(app) as client:

        async def ask(depth: int) -> httpx.Response:
            deep = b"[" * depth + b"]" * depth
            body = b'{"input":[{"role":"user","content":"x","y":%b}],"x":"%b"}' % (deep, b"x" * LARGE_BODY)
            return await client.post("/v1/responses", content=body)

        # The deepest accepted body: near the recursion limit up to Python 3.11, near C's own since 3.12.
        accepted, refused = 1, 100_000
        while refused - accepted > 1:
            depth = (accepted + refused) // 2
            if (await ask(depth)).status_code == 200:
                accepted = depth
            else:
                refused = depth
        statuses = set()
        for depth in range(accepted - 200, accepted + 1, 5):
            more = {"input": "two", "previous_response_id": (await ask(depth)).json()["id"]}
            statuses.add((await client.post("/v1/responses", json=more)).status_code)
    assert statuses == {200, 400}


async def test_names_of_one_large_item_do_not_add_up_to_any_size() -> None:
    app = app_of(ScriptedEngine())
    item = b'[{"type":"message","role":"user","content":"%b"}]' % (b"x" * MIB)
    app.context.responses.add(StoredResponse("resp_1", b"{}", [], {"msg_1": item}), None)
    refused = await post(app, {"input": [{"type": "item_reference", "id": "msg_1"}] * 65})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")
    assert f"more than {64 * MIB} bytes" in refused.json()["error"]["message"]


async def test_a_request_is_as_large_as_what_it_goes_on_from() -> None:
    app = app_of(ScriptedEngine())
    item = b'[{"type":"message","role":"user","content":"","x":"%b"}]' % (b"x" * LARGE_BODY)
    small = b'[{"role":"user","content":"hi"}]'
    app.context.responses.add(StoredResponse("large", b"{}", [item], {"msg_1": item}), None)
    app.context.responses.add(StoredResponse("small", b"{}", [small], {}), None)
    seen: list[bool] = []
    app.observers.append(lambda exchange, _: seen.append(exchange.is_large))
    for body in ({"input": "x"}, {"input": "x", "previous_response_id": "small"},
                 {"input": "x", "previous_response_id": "large"},
                 {"input": [{"type": "item_reference", "id": "msg_1"}]}):  # fmt: skip
        await post(app, body)
    assert seen == [False, False, True, True]


def stored(name: str, size: int, before: StoredResponse | None = None) -> StoredResponse:
    """Return a response of `size` bytes in addition to those of the response that it continues."""
    item = f"{name:x<{size // 2}}".encode()
    history = [*(before.history if before is not None else ()), item]
    return StoredResponse(name, b"b" * (size - len(item)), history, {f"item of {name}": item})


def test_the_oldest_go_where_there_is_no_room() -> None:
    store = ResponseStore(100, max_bytes=100)
    for name in "abc":
        store.add(stored(name, 40), None)
    assert [store.find(name, None) is not None for name in "abc"] == [False, True, True]
    assert [store.find_item(f"item of {name}", None) is not None for name in "abc"] == [False, True, True]
    assert store.size == 80
    store.add(stored("large", 101), None)  # exceeds the whole store, so it must not evict the others
    assert store.find("large", None) is None and store.size == 80
    for _ in range(2):
        store.delete("b", None)
        assert store.size == 40
    store.add(stored("d", 60), None)
    assert store.find("c", None) is not None and store.size == 100


def test_a_tenant_is_part_of_the_name() -> None:
    store = ResponseStore(10)
    store.add(stored("a", 40), "alice")
    for tenant in ("bob", None):
        assert store.find("a", tenant) is None
        assert store.find_item("item of a", tenant) is None
        store.delete("a", tenant)
    assert store.find("a", "alice") is not None
    store.delete("a", "alice")
    assert store.find("a", "alice") is None and store.size == 0


def test_what_several_answers_share_counts_once() -> None:
    store = ResponseStore(100, max_bytes=100)
    last = None
    for name in "abcd":  # with their whole histories they would have 40 + 60 + 80 + 100 bytes
        last = stored(name, 25 if last else 40, last)
        store.add(last, None)
    assert store.find("a", None) is None  # of 115 bytes, the body of the first response could be freed
    assert store.size == 95
    for name in "bcd":
        store.delete(name, None)
    assert store.size == 0 and store.find_item("item of a", None) is None


def test_a_share_that_nobody_takes_is_another_s_until_then() -> None:
    store = ResponseStore(10)
    for tenant in ("alice", "bob"):
        for i in range(10):
            store.add(stored(f"{i}", 40), tenant)
    for tenant in ("alice", "bob"):
        assert [i for i in range(10) if store.find(f"{i}", tenant)] == [5, 6, 7, 8, 9]


def test_no_tenant_takes_the_place_of_anothers_answers() -> None:
    for store in (ResponseStore(4), ResponseStore(100, max_bytes=160)):
        store.add(stored("mine", 40), "alice")
        for i in range(10):
            store.add(stored(f"{i}", 40), "bob")
        assert store.find("mine", "alice") is not None
        kept = [store.find(f"{i}", "bob") is not None for i in range(10)]
        assert kept == [False] * 7 + [True] * 3


async def test_the_sdk_pages_through_what_a_response_answers() -> None:
    async with sdk_of(app_of(ScriptedEngine(say("yes")), Settings(api_key=("a", "b"))), "a") as client:
        first = await client.responses.create(model="m", input="one")
        texts: list[Any] = [{"role": "user", "content": f"no. {i}", "x": 10**30} for i in range(3)]
        second = await client.responses.create(model="m", input=texts, previous_response_id=first.id)
        orders: list[Any] = [("asc", 1), ("desc", -1)]
        for order, wanted in orders:
            pages = await client.responses.input_items.list(second.id, limit=2, order=order)
            found: list[Any] = [item async for item in pages]
            said = ["one", "yes", "no. 0", "no. 1", "no. 2"][::wanted]
            assert [item.content[0].text for item in found] == said
            ids = {item.id for item in found}
            assert len(ids) == 5 and first.output[0].id in ids  # by which `item_reference` finds it
        with pytest.raises(openai.NotFoundError):
            await client.with_options(api_key="b").responses.input_items.list(second.id)


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "limit=٣", "order=up", "after=none"])
async def test_a_page_that_cannot_be_is_refused(query: str) -> None:
    app = app_of(ScriptedEngine(say("yes")))
    made = await respond(app, "hi")
    async with client_of(app) as client:
        answer = await client.get(f"/v1/responses/{made['id']}/input_items?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.partition("=")[0]


async def test_the_tokens_of_an_input_are_those_that_its_answer_counts() -> None:
    app = app_of(ScriptedEngine(say("yes")))
    made = await respond(app, "hi")
    body = {"input": "and now?", "previous_response_id": made["id"], "tools": TOOLS}
    async with client_of(app) as client:
        counted = await client.post("/v1/responses/input_tokens", json=body)
        refused = await client.post("/v1/responses/input_tokens", json={"input": 5})
    whole = await respond(app, body.pop("input"), **body)
    assert counted.json() == {
        "object": "response.input_tokens", "input_tokens": whole["usage"]["input_tokens"],
    }  # fmt: skip
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "input"


async def test_a_response_may_go_on_without_new_input() -> None:
    engine = ScriptedEngine(say("yes"))
    app = app_of(engine)
    made = await respond(app, "hi")
    answer = await post(app, {"previous_response_id": made["id"]})
    assert answer.status_code == 200
    assert prompts(engine)[1].startswith(prompts(engine)[0] + "yes")


async def test_an_answer_says_whether_it_is_stored() -> None:
    app = app_of(ScriptedEngine(say("yes")), Settings(response_store=0))
    assert (await respond(app, "hi"))["store"] is False
    app = app_of(ScriptedEngine(say("yes")))
    assert (await respond(app, "hi"))["store"] is True
    assert (await respond(app, "hi", store=False))["store"] is False


async def test_listed_items_of_all_kinds_are_those_of_the_sdk() -> None:
    """OpenAI's lists have fields that a client may leave out of its input."""
    items: list[Any] = [
        {"role": "user", "content": "a"},
        {"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "x", "output": "y"},
        {"type": "custom_tool_call", "call_id": "z", "name": "c", "input": "q"},
        {"type": "custom_tool_call_output", "call_id": "z", "output": "w"},
        {"role": "assistant", "content": "yo"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "yo"}]},
        {"role": "user", "content": "b"},
    ]
    app = app_of(ScriptedEngine(say("yes")))
    made = await respond(app, items)
    async with client_of(app) as client:
        listed = (await client.get(f"/v1/responses/{made['id']}/input_items?order=asc")).json()
    assert len(listed["data"]) == len(items)
    for item in listed["data"]:
        TypeAdapter(ResponseItem).validate_json(json.dumps(item), strict=True)
