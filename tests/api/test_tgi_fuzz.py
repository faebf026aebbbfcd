"""Random JSON on the native routes, nearly valid and far from it: never a 500 or a lost permit."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.asgi import events_of
from tests.support.fuzzing import post_and_check
from tests.support.scripted_engine import ScriptedEngine, say, scripted_app
from tgi_asgi.api.tgi.schema import GenerateParameters
from tgi_asgi.settings import Settings

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 600), st.floats(), st.floats(-3, 3),
    st.text(max_size=8),
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [field.name for field in msgspec.structs.fields(GenerateParameters)]
GRAMMARS = st.fixed_dictionaries(
    {"type": st.sampled_from(["json", "json_object", "json_schema", "regex", "x"]), "value": ANYTHING}
)
PARAMETERS = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "max_new_tokens": st.integers(1, 9), "temperature": st.floats(0.1, 2), "top_k": st.integers(1, 9),
            "stop": st.lists(st.text(max_size=2), max_size=3), "best_of": st.integers(0, 3),
            "details": st.booleans(), "decoder_input_details": st.booleans(),
            "top_n_tokens": st.integers(0, 6), "truncate": st.integers(0, 9),
            "seed": st.integers(0, 2**64), "grammar": GRAMMARS, "return_full_text": st.booleans(),
        },
    ),
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4),
    ANYTHING,
)  # fmt: skip
GENERATES = st.fixed_dictionaries(
    {"inputs": st.text(max_size=9) | ANYTHING}, optional={"parameters": PARAMETERS, "stream": st.booleans()}
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "x"]), "content": st.text(max_size=5) | ANYTHING}
    ),
    max_size=2,
)
CHATS = st.fixed_dictionaries({"messages": MESSAGES | ANYTHING})
PROMPTS = st.fixed_dictionaries({"prompt": st.text(max_size=5) | ANYTHING})
ANY_KIND = GENERATES | CHATS | PROMPTS | ANYTHING


async def post(path: str, body: Any) -> None:
    engine = ScriptedEngine(say("Hel", "lo", b"\xf0\x9f"))
    app = scripted_app(engine, Settings(enable_prefill_logprobs=True))
    data = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode(errors="replace")
    call = await post_and_check(app, engine, path, data)
    if call.headers["content-type"].startswith("text/event-stream"):
        events_of(call.content)
    elif call.status >= 400:
        assert call.json()["error"]
    else:
        assert "error" not in call.json()


@settings(max_examples=200)
@given(st.sampled_from(["/", "/generate", "/generate_stream"]), GENERATES)
def test_random_generate_requests(path: str, body: Any) -> None:
    asyncio.run(post(path, body))


@settings(max_examples=150)
@given(st.sampled_from(["/invocations", "/tokenize", "/chat_tokenize", "/detokenize"]), ANY_KIND)
def test_random_requests_to_routes_of_several_kinds(path: str, body: Any) -> None:
    asyncio.run(post(path, body))


@settings(max_examples=100)
@given(st.fixed_dictionaries({"instances": st.lists(ANY_KIND, max_size=3) | ANYTHING}))
def test_random_vertex_calls(body: Any) -> None:
    asyncio.run(post("/vertex", body))


@settings(max_examples=100)
@given(
    st.sampled_from(["/", "/generate_stream", "/invocations", "/vertex", "/tokenize", "/detokenize"]),
    st.binary(max_size=60),
)
def test_random_bytes(path: str, body: bytes) -> None:
    asyncio.run(post(path, body))
