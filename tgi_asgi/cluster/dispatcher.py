"""Several models at one address: each request goes to the application of the model that it names.

Each model has its own application, with the same keys and limits. Requests that concern all models are sent
to every application and the answers merged. Errors are reported by the applications.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson

from tgi_asgi.api.asgi import (
    BODY_TIMEOUT_S,
    Header,
    Message,
    Receive,
    Scope,
    Send,
    has_small_parts,
    header,
)
from tgi_asgi.api.errors import NATIVE
from tgi_asgi.api.exchange import LARGE_BODY, Exchange
from tgi_asgi.api.routes import path_of
from tgi_asgi.app import App
from tgi_asgi.errors import TgiError
from tgi_asgi.types import EngineState

_PROBES = frozenset({"/health", "/ping", "/livez", "/readyz"})
_READS = frozenset({"GET", "HEAD"})  # others, such as a browser's preflight, go to the first application
# Lists of models, by path, with the key of the list in the answer: OpenAI's and Anthropic's, and Ollama's.
_LISTS = {"/v1/models": "data", "/api/tags": "models", "/api/ps": "models"}
_SAMPLE = re.compile(r"([\w:]+)(?:\{(.*)\})? (\S+)")


class _Named(msgspec.Struct):
    """Fields of a body that name its model: `model`, Ollama's older `name`, or TGI's adapter's parameters."""

    model: Any = None
    name: Any = None
    parameters: Any = None


_BODY = msgspec.json.Decoder(_Named)


def dispatch_app(apps: Sequence[App]) -> App | ModelDispatcher:
    """Return an application that answers for these; a single one is returned as is."""
    return apps[0] if len(apps) == 1 else ModelDispatcher(apps)


class ModelDispatcher:
    """One ASGI application for several; the first answers requests that name no model."""

    def __init__(self, apps: Sequence[App]) -> None:
        self._apps = apps
        for app in apps:  # what one model has answered may continue with another
            app.context.responses = apps[0].context.responses
            app.context.conversations = apps[0].context.conversations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            await self._apps[0](scope, receive, send)
            return
        method, path = scope["method"], path_of(scope)
        if path in _LISTS and method in _READS:
            await self._list(_LISTS[path], scope, receive, send)
        elif path == "/metrics" and method in _READS:
            await self._measure(scope, send)
        elif path in _PROBES:
            await self._best(path)(scope, receive, send)
        elif path.startswith("/v1/models/"):
            await self._serving(path.removeprefix("/v1/models/"))(scope, receive, send)
        elif method == "POST":
            await self._by_body(scope, receive, send)
        else:
            await self._apps[0](scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        for app in self._apps:
            app.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for app in self._apps:
            await app.stop()
        await send({"type": "lifespan.shutdown.complete"})

    def _serving(self, name: object) -> App:
        """Return the application that serves a model or adapter of this name, otherwise the first."""
        if isinstance(name, str):
            names = {name, name.removesuffix(":latest")}  # as Ollama's clients write it
            for app in self._apps:
                served = app.context.served
                adapters = served.adapters if served is not None else None
                is_own = app.context.settings.model_name in names
                if is_own or (adapters is not None and any(each in adapters for each in names)):
                    return app
        return self._apps[0]

    def _best(self, path: str) -> App:
        """Return the application that answers a probe: the first ready one; `/readyz`: first unready."""
        is_well = [app.context.state is EngineState.READY for app in self._apps]
        if path == "/readyz":
            return self._apps[is_well.index(False)] if False in is_well else self._apps[0]
        return self._apps[is_well.index(True)] if True in is_well else self._apps[0]

    async def _by_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, up to the limit, and pass it to the application that it names."""
        first = self._apps[0]
        settings, budget = first.context.settings, first.context.body_budget
        declared = header(scope, b"content-length") or b""
        if declared.isdigit() and int(declared) > settings.payload_limit:
            await first(scope, receive, send)  # responds with the error without reading it
            return
        messages: list[Message] = []
        size, is_late = 0, False
        try:
            first.keys.check(Exchange(first.context, scope, receive, send, NATIVE))
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while size <= settings.payload_limit and not has_small_parts(len(messages), size):
                    message = await receive()
                    messages.append(message)
                    num_bytes = len(message.get("body", b""))
                    budget.acquire(num_bytes, size)
                    size += num_bytes
                    if not message.get("more_body", False):
                        break
            name = _name_in(messages) if size < LARGE_BODY else await asyncio.to_thread(_name_in, messages)
        except TgiError:
            name = None  # the application raises and reports the same error
        except TimeoutError:
            name, is_late = None, True
        finally:
            budget.release(size)

        async def replay() -> Message:
            if is_late and not messages:
                raise TimeoutError  # which the application reports as its own
            return messages.pop(0) if messages else await receive()

        await self._serving(name)(scope, replay, send)

    async def _list(self, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the models of all applications, except those still loading."""
        answers = [await _answer_of(app, scope) for app in self._apps]
        listed = [answer for answer in answers if answer.status == 200]
        if not listed:
            await self._apps[0](scope, receive, send)
            return
        lists = [orjson.loads(answer.body) for answer in listed]
        joined = lists[0] | {key: [model for each in lists for model in each[key]]}
        if "last_id" in joined:  # Anthropic's form
            joined["last_id"] = lists[-1]["last_id"]
        await _respond(scope, send, listed[0], orjson.dumps(joined))

    async def _measure(self, scope: Scope, send: Send) -> None:
        """Answer with the metrics of all applications; each sample has its model's name."""
        answers = [await _answer_of(app, scope) for app in self._apps]
        names = [str(app.context.settings.model_name) for app in self._apps]
        texts = [answer.body.decode() for answer in answers]
        body = await asyncio.to_thread(merged_metrics, dict(zip(names, texts, strict=True)))
        await _respond(scope, send, answers[0], body.encode())


def _name_in(messages: Sequence[Message]) -> object:
    """Return the model or adapter that a body names, or None."""
    try:
        named = _BODY.decode(b"".join(message.get("body", b"") for message in messages))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    adapter = named.parameters.get("adapter_id") if isinstance(named.parameters, dict) else None
    return next((name for name in (named.model, adapter, named.name) if name is not None), None)


def merged_metrics(texts: dict[str, str]) -> str:
    """Merge expositions, keyed by model, into one: each family once, each sample with `model_name`."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for model, text in texts.items():
        written = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                if line not in heads.setdefault(family, []):
                    heads[family].append(line)
                continue
            found = _SAMPLE.fullmatch(line)
            if found is None:
                continue
            name, labels, value = found.groups()
            if not labels or 'model_name="' not in labels:
                labels = f'model_name="{written}"' + (f",{labels}" if labels else "")
            samples.setdefault(family, []).append(f"{name}{{{labels}}} {value}")
    lines = [line for family, head in heads.items() for line in (*head, *samples.get(family, ()))]
    return "\n".join([*lines, ""])


@dataclass(slots=True)
class _Answer:
    """An application's answer."""

    status: int = 500
    headers: Sequence[Header] = ()
    body: bytes = b""


async def _answer_of(app: App, scope: Scope) -> _Answer:
    """Return an application's answer to a GET, whatever the request's own method."""
    answer = _Answer()

    async def take(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], message["headers"]
        else:
            answer.body += message.get("body", b"")

    async def nothing() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    await app({**scope, "method": "GET"}, nothing, take)
    return answer


async def _respond(scope: Scope, send: Send, like: _Answer, body: bytes) -> None:
    """Answer with another body and the headers of an application's answer, such as request id and CORS."""
    headers = [header for header in like.headers if header[0] != b"content-length"]
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    shown = b"" if scope["method"] == "HEAD" else body
    await send({"type": "http.response.body", "body": shown, "more_body": False})
