"""The API documentation page: every route, its fields, and a form that sends requests."""

from __future__ import annotations

import json
import re
import threading

import httpx
import pytest

from tests.page.conftest import ChatPage, say_in_halves
from tests.support.scripted_engine import scripted_app
from tgi_asgi.api import table
from tgi_asgi.settings import Settings

pytestmark = pytest.mark.page


def unfold(chat: ChatPage, method: str, path: str) -> str:
    """Open a route; return its CSS selector."""
    name = f"{method.lower()}{path}".replace("/", "_").strip("_")
    selector = f"[id='{name}']"
    chat.page.locator(f"{selector} > summary").click()
    return selector


def test_every_route_is_there_with_its_fields(chat: ChatPage) -> None:
    chat.open("docs")
    chat.expect(".route").to_be_visible()
    shown = chat.page.locator(".route > summary").evaluate_all(
        "(all) => all.map((row) => ['.method', 'code'].map((part) => row.querySelector(part).textContent))"
    )
    rows = [row for row in table.routes(Settings()) if row.summary]
    documented = [[row.method, row.path.replace(":path}", "}")] for row in rows]
    assert sorted(shown) == sorted(documented)
    for summary in chat.page.locator(".route > summary").all():
        summary.click()
    assert "[object" not in chat.page.locator("main").inner_text()
    chat.expect(".route[open] dt code").to_be_visible()


def test_fields_have_types_bounds_and_fields_of_their_own(chat: ChatPage) -> None:
    chat.open("docs")
    route = unfold(chat, "POST", "/v1/chat/completions")
    rows = chat.page.locator(f"{route} dl").first
    assert "temperature number | null" in " ".join(rows.inner_text().split())
    temperature = rows.locator("dt", has_text="temperature").locator("+ dd")
    assert "≥ 0, ≤ 2" in temperature.inner_text()
    messages = rows.locator("dt", has_text="messages").locator("+ dd")
    assert "required" in messages.inner_text()
    messages.locator("summary").first.click()
    chat.expect(f"{route} dl dl dt").to_contain_text("role")


def test_a_stream_is_tried_and_stopped(chat: ChatPage, gate: threading.Event) -> None:
    chat.engine.script = say_in_halves(gate, "First ", "second")
    chat.open("docs")
    route = unfold(chat, "POST", "/v1/chat/completions")
    form = chat.page.locator(f"{route} .try")
    assert json.loads(form.get_by_label("Body").input_value())["stream"] is True
    form.get_by_role("button", name="Send").click()
    chat.expect(f"{route} .answer pre").to_contain_text("First")
    form.get_by_role("button", name="Stop").click()
    chat.expect(f"{route} .answer .type").to_have_text("Stopped")
    gate.set()
    form.get_by_role("button", name="Send").click()
    chat.expect(f"{route} .answer pre").to_contain_text("[DONE]")
    chat.expect(f"{route} .answer .type").to_contain_text("text/event-stream")


def test_every_example_is_taken_by_its_route(chat: ChatPage) -> None:
    chat.serve(Settings(max_best_of=2))
    chat.open("docs")
    chat.expect(".route").to_be_visible()
    made = httpx.post(f"{chat.url}v1/conversations")
    parts = {"conversation": made.json()["id"]}  # of paths
    statuses = {}
    for summary in chat.page.locator(".route > summary", has_text="POST").all():
        summary.click()
        route = summary.locator("xpath=..")
        path = summary.locator("code").inner_text()
        for name in re.findall(r"{(\w+)}", path):
            route.get_by_label(name, exact=True).fill(parts[name])
        route.get_by_role("button", name="Send").click()
        line = route.locator(".answer .type")
        route.get_by_role("button", name="Send").wait_for()
        statuses[path] = line.inner_text().split()[0]
        summary.click()
    assert len(statuses) > 15
    # The scripted model computes no vectors; every other form must succeed.
    refused = {path for path, status in statuses.items() if status != "200"}
    assert refused == VECTORS, statuses


VECTORS = {
    "/v1/embeddings", "/v1/score", "/score", "/embed", "/rerank", "/v1/rerank", "/v2/rerank", "/api/embed",
    "/api/embeddings", "/similarity", "/predict", "/classify", "/v1/classify",
}  # fmt: skip


def test_paths_have_their_parts_and_errors_are_shown(chat: ChatPage) -> None:
    chat.open("docs")
    route = unfold(chat, "GET", "/v1/models/{model}")
    chat.page.locator(route).get_by_label("model").fill("other/model")
    chat.page.locator(route).get_by_role("button", name="Send").click()
    chat.expect(f"{route} .answer .type").to_contain_text("404")
    chat.expect(f"{route} .answer pre").to_contain_text("model_not_found")
    chat.page.locator(route).get_by_label("model").fill("toy/model")
    chat.page.locator(route).get_by_role("button", name="Send").click()
    chat.expect(f"{route} .answer pre").to_contain_text('"id": "toy/model"')


def test_a_key_is_asked_for_and_the_administrators_is_another(chat: ChatPage) -> None:
    settings = Settings(api_key=("user",), admin_api_key="administrator")
    chat.serve_app(scripted_app(chat.engine, settings))
    chat.open("docs")
    field = chat.page.get_by_label("API key")
    field.fill("user")
    chat.page.keyboard.press("Enter")
    route = unfold(chat, "POST", "/reset_prefix_cache")
    chat.page.locator(route).get_by_role("button", name="Send").click()
    field.fill("administrator")
    chat.page.keyboard.press("Enter")
    chat.expect(f"{route} .answer .type").to_contain_text("200")
    assert (chat.stored_value("key"), chat.stored_value("admin-key")) == ("user", "administrator")
    with chat.page.expect_download() as started:
        chat.page.get_by_role("link", name="OpenAPI document").click()
    assert json.loads(started.value.path().read_text("utf-8"))["openapi"] == "3.1.0"


def test_an_address_opens_its_route(chat: ChatPage) -> None:
    chat.open("docs#post_v1_completions")
    chat.expect("#post_v1_completions[open]").to_be_in_viewport()
