"""Conversations: what responses in them are shown, what is added to them, who owns them, what is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import openai
import pytest

from tests.api.test_response_store import TEMPLATE, TOOLS, chat, prompts
from tests.support.asgi import peak_of, request
from tests.support.client import client_of
from tests.support.scripted_engine import Script, ScriptedChannel, ScriptedEngine, fail_with, say
from tests.support.tool_app import CALLS, app_of, sdk_of
from tests.support.waiting import until
from tgi_asgi.api.exchange import LARGE_BODY
from tgi_asgi.api.openai.conversation_store import ConversationStore, StoredConversation, stored_form
from tgi_asgi.api.openai.response_store import StoredResponse
from tgi_asgi.app import App
from tgi_asgi.errors import GenerationFailed, TgiError
from tgi_asgi.settings import MIB, Settings
from tgi_asgi.types import TokenEvent

ONE: Any = {"type": "message", "role": "user", "content": "one"}


def say_after(gate: asyncio.Event, *tokens: str) -> Script:
    """Return a script that says tokens once the gate is open."""

    async def script(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        await gate.wait()
        async for batch in say(*tokens)(channel):
            yield batch

    return script


async def texts(client: openai.AsyncOpenAI, conversation: str) -> list[Any]:
    listed = client.conversations.items.list(conversation, order="asc", limit=2)
    return [item.content[0].text async for item in listed if item.type == "message"]  # type: ignore[union-attr]


async def test_a_response_continues_its_conversation_and_is_added_to_it() -> None:
    engine = ScriptedEngine(say("Hel", "lo"))
    async with sdk_of(app_of(engine)) as client:
        made = await client.conversations.create(items=[ONE], metadata={"a": "b"})
        first = await client.responses.create(model="m", input="two", conversation=made.id)
        async with client.responses.stream(model="m", input="three", conversation={"id": made.id}) as stream:
            second = await stream.get_final_response()
        said = await texts(client, made.id)
        kept = await client.conversations.retrieve(made.id)
    assert prompts(engine)[1].endswith("one<|im_end|>\n" + chat("two", "Hello", "three"))
    assert said == ["one", "two", "Hello", "three", "Hello"]
    assert [each.conversation and each.conversation.id for each in (first, second)] == [made.id] * 2
    assert (kept.id, kept.metadata, kept.created_at) == (made.id, {"a": "b"}, made.created_at)


async def test_an_answer_is_added_even_if_it_is_not_stored_by_itself() -> None:
    async with sdk_of(app_of(ScriptedEngine(say("Hello")))) as client:
        made = await client.conversations.create()
        await client.responses.create(model="m", input="one", conversation=made.id, store=False)
        assert await texts(client, made.id) == ["one", "Hello"]


@pytest.mark.parametrize("adds", [False, True])
async def test_items_that_come_at_the_same_time_are_all_kept_whatever_their_ids(adds: bool) -> None:
    """Of another answer, or of a request that only adds items."""
    gate, same = asyncio.Event(), {**ONE, "id": "same"}
    engine = ScriptedEngine(say_after(gate, "Hello"))
    app = app_of(engine)
    async with client_of(app) as client:
        made = (await client.post("/v1/conversations")).json()["id"]
        responses = []
        for text in ["b"] if adds else ["a", "b"]:
            body = {"model": "m", "input": [{**same, "content": text}], "conversation": made}
            responses.append(asyncio.create_task(client.post("/v1/responses", json=body)))
            await until(lambda: len(engine.requests) == len(responses))
        if adds:
            items = {"items": [{**same, "content": "a"}]}
            await client.post(f"/v1/conversations/{made}/items", json=items)
        gate.set()
        for response in responses:
            assert (await response).status_code == 200
        listed = (await client.get(f"/v1/conversations/{made}/items?order=asc")).json()["data"]
    said = [item["content"][0]["text"] for item in listed]
    turns = [["a", "b", "Hello"]] if adds else [["a", "Hello", "b", "Hello"], ["b", "Hello", "a", "Hello"]]
    assert said in turns
    assert len({item["id"] for item in listed}) == len(listed)


async def test_a_failed_answer_adds_nothing() -> None:
    async with sdk_of(app_of(ScriptedEngine(fail_with(GenerationFailed("no"))))) as client:
        made = await client.conversations.create()
        with pytest.raises(openai.InternalServerError):
            await client.responses.create(model="m", input="one", conversation=made.id)
        assert await texts(client, made.id) == []


async def test_calls_and_their_results_go_on_in_a_conversation() -> None:
    engine = ScriptedEngine(say(*CALLS[4:12]))
    async with sdk_of(app_of(engine, chat_template=TEMPLATE)) as client:
        made = await client.conversations.create()
        first = await client.responses.create(model="m", input="where?", conversation=made.id, tools=TOOLS)
        [call] = [item for item in first.output if item.type == "function_call"]
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        await client.responses.create(model="m", input=[result], conversation=made.id, tools=TOOLS)
        kinds = [item.type async for item in client.conversations.items.list(made.id, order="asc")]
    later = prompts(engine)[1]
    assert later.index("where?") < later.index("Paris") < later.index("sunny")
    assert [kind for kind in kinds if kind != "message"][:2] == ["function_call", "function_call_output"]


async def test_items_are_added_listed_read_and_deleted() -> None:
    async with sdk_of(app_of(ScriptedEngine())) as client:
        made = await client.conversations.create()
        items = client.conversations.items
        given: list[Any] = [{**ONE, "id": "same", "content": f"{i}"} for i in range(3)]
        added = await items.create(made.id, items=given)
        assert len({item.id for item in added.data}) == 3 and added.data[0].id == "same"
        newest = await items.list(made.id, limit=1)
        assert newest.data[0].id == added.data[-1].id and newest.has_more
        assert (await items.retrieve("same", conversation_id=made.id)) == added.data[0]
        assert (await items.delete("same", conversation_id=made.id)).id == made.id
        assert await texts(client, made.id) == ["1", "2"]
        for missing in (items.retrieve, items.delete):
            with pytest.raises(openai.NotFoundError, match="'same' not found"):
                await missing("same", conversation_id=made.id)
        changed = await client.conversations.update(made.id, metadata={"c": "d"})
        assert changed.metadata == {"c": "d"}
        assert (await client.conversations.delete(made.id)).deleted
        with pytest.raises(openai.NotFoundError, match="not found"):
            await items.list(made.id)


async def test_a_conversation_is_only_its_key_s() -> None:
    app = app_of(ScriptedEngine(), Settings(api_key=("a", "b")))
    async with sdk_of(app, "a") as client:
        made = await client.conversations.create(items=[ONE])
        other = client.with_options(api_key="b")
        attempts: list[Callable[[], Any]] = [
            lambda: other.conversations.retrieve(made.id),
            lambda: other.conversations.delete(made.id),
            lambda: other.conversations.items.create(made.id, items=[ONE]),
            lambda: other.responses.create(model="m", input="two", conversation=made.id),
        ]
        for attempt in attempts:
            with pytest.raises(openai.NotFoundError):
                await attempt()
        assert await texts(client, made.id) == ["one"]


async def post(app: App, path: str, body: dict[str, Any]) -> httpx.Response:
    async with client_of(app) as client:
        return await client.post(path, json=body)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/responses", {"input": "a", "conversation": "conv_1"}, 404, "conversation"),
        (
            "/v1/responses",
            {"input": "a", "conversation": "conv_1", "previous_response_id": "resp_1"},
            400,
            "conversation",
        ),
        ("/v1/conversations", {"items": [ONE, {"type": "thing"}]}, 400, "items[1].type"),
        ("/v1/conversations", {"items": [{"type": "item_reference", "id": "x"}]}, 400, "items[0].id"),
        ("/v1/conversations", {"metadata": {"a": 5}}, 400, "metadata"),
        ("/v1/conversations/conv_1", {}, 400, "metadata"),
        ("/v1/conversations/conv_1", {"metadata": {}}, 404, "id"),
        ("/v1/conversations/conv_1/items", {"items": [ONE]}, 404, "id"),
    ],
)
async def test_what_a_conversation_cannot_be(path: str, body: Any, status: int, param: str) -> None:
    answer = await post(app_of(ScriptedEngine()), path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


async def test_a_server_that_stores_nothing_has_no_conversations() -> None:
    answer = await post(app_of(ScriptedEngine(), Settings(response_store=0)), "/v1/conversations", {})
    assert answer.status_code == 404 and "--response-store" in answer.text


@pytest.mark.parametrize("path", ["/v1/conversations", "/v1/conversations/conv_1/items"])
async def test_names_of_one_large_item_take_no_more_memory_than_a_conversation_may(path: str) -> None:
    app = app_of(ScriptedEngine())
    app.context.conversations.add(conversation("conv_1"), None)
    item = b'[{"type":"message","role":"user","content":"%b"}]' % (b"x" * MIB)
    app.context.responses.add(StoredResponse("resp_1", b"{}", [], {"msg_1": item}), None)
    call = request("POST", path, {"items": [{"type": "item_reference", "id": "msg_1"}] * 65})
    peak = await peak_of(app, call)
    assert (call.status, call.json()["error"]["param"]) == (400, "items")
    assert peak < 10 * MIB


async def test_a_request_is_as_large_as_the_items_that_it_names() -> None:
    app = app_of(ScriptedEngine())
    item = b'[{"type":"message","role":"user","content":"","x":"%b"}]' % (b"x" * LARGE_BODY)
    app.context.responses.add(StoredResponse("resp_1", b"{}", [], {"msg_1": item}), None)
    seen: list[bool] = []
    app.observers.append(lambda exchange, _: seen.append(exchange.is_large))
    for given in (ONE, {"type": "item_reference", "id": "msg_1"}):
        await post(app, "/v1/conversations", {"items": [given]})
    assert seen == [False, True]


def conversation(name: str, **items: bytes) -> StoredConversation:
    return StoredConversation(name, 0, {}, items)


def test_the_conversation_unused_for_longest_is_dropped() -> None:
    store = ConversationStore(2)
    store.add(conversation("a"), None)
    store.add(conversation("b"), None)
    assert store.find("a", None) is not None
    store.add(conversation("c"), None)
    assert [name for name in "abc" if store.find(name, None)] == ["a", "c"]


def test_a_tenant_that_holds_most_makes_room_for_others() -> None:
    store = ConversationStore(2)
    for name in "ab":
        store.add(conversation(name), "greedy")
    store.add(conversation("c"), "other")
    assert store.find("a", "greedy") is None and store.find("b", "greedy") and store.find("c", "other")


def test_an_item_whose_id_is_taken_gets_another() -> None:
    store, first = ConversationStore(9), conversation("a")
    empty = first.size
    store.add(first, None)
    for text in ("one", "two"):
        added = store.append(first, stored_form([{**ONE, "id": 'sa"me', "content": text}]))
        assert added is not None
        assert [json.loads(item)[0]["id"] for item in added.values()] == [*added]
    listed = [json.loads(item)[0] for item in first.items.values()]
    assert [item["content"][0]["text"] for item in listed] == ["one", "two"]
    assert listed[0]["id"] == 'sa"me' and listed[1]["id"].startswith("msg_")
    for item_id in [*first.items]:
        assert store.drop_item(first, item_id)
    assert store.size == empty


def test_an_item_gets_another_id_however_deep_it_is_nested() -> None:
    """An answer that has been sent must not fail because it ends deeper in the stack than it was read."""
    store, first = ConversationStore(9), conversation("a", same=b"")
    deep = b"[" * 100_000 + b"]" * 100_000
    added = store.append(first, {"same": b'[{"id":"same","type":"item","y":%b}]' % deep})
    assert added is not None and len(first.items) == 2


def test_bytes_are_bounded_and_counted_exactly() -> None:
    store = ConversationStore(9, max_bytes=10_000)
    first = conversation("a", x=b"x" * 5000)
    empty = conversation("z").size
    assert store.add(first, None) and not store.add(conversation("b", y=b"y" * 10_000), None)
    assert not store.append(first, {"y": b"y" * 5000})
    assert store.append(first, {"y": b"y" * 100}) and store.drop_item(first, "x")
    assert not store.drop_item(first, "x") and store.drop_item(first, "y")
    assert store.size == first.size == empty
    assert store.append(first, {"x": b"x" * 5000}) and store.add(conversation("b", y=b"y" * 5000), None)
    assert store.find("a", None) is None  # both do not fit
    store.delete("b", None)
    assert store.size == 0


async def test_a_conversation_without_an_id_is_refused_and_one_is_made_without_a_body() -> None:
    async with client_of(app_of(ScriptedEngine(say("Hello")))) as client:
        made = await client.post("/v1/conversations")
        asked = {"model": "m", "input": "one", "conversation": ""}
        refused = await client.post("/v1/responses", json=asked)
    assert made.status_code == 200 and made.json()["id"].startswith("conv_")
    assert refused.status_code == 404
    assert (refused.json()["error"]["param"], refused.json()["error"]["code"]) == (
        "conversation", "conversation_not_found"
    )  # fmt: skip
