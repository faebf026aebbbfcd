"""Bad requests on `/v1`: the status, the field's path, and the message."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.support.asgi import request, send
from tests.support.scripted_engine import ScriptedEngine, scripted_app, toy_info
from tgi_asgi.settings import Settings

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
CONTRADICTORY = {"type": "integer", "minimum": 5, "maximum": 4}
NOT: dict[str, Any] = {"properties": {"a": {"not": {}}}}
UNENFORCEABLE = {"type": "function", "function": {"name": "g", "parameters": NOT, "strict": True}}


async def refused(path: str, body: Any, settings: Settings | None = None) -> dict[str, Any]:
    """Return the error object of a request; check that it never reaches the engine."""
    engine = ScriptedEngine()
    call = await send(scripted_app(engine, settings), request("POST", path, body))
    assert call.status == 400, (call.status, call.content)
    assert engine.channels == []
    assert engine.num_permits == 128
    error = call.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == "invalid_request_error"
    return dict(error)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b'{"messages":', b"nope", b"\xff\xfe", b'{"messages":[],"x":"\xff"}',
        b'{"temperature":NaN}', b'{"temperature":Infinity}', b'{"user":"\\ud83d"}',
        b'{"x":' + b"[" * 200_000, b"{} {}",
        b'{"seed":1e400}', b"\xef\xbb\xbf{}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
async def test_what_is_no_json_is_a_400(path: str, body: bytes) -> None:
    await refused(path, body)


async def test_what_tgi_ignored_is_ignored_in_its_compatible_mode() -> None:
    app = scripted_app(ScriptedEngine(), Settings(tgi_compat=True))
    for path, body in ((CHAT, {"messages": HI}), ("/v1/completions", {"prompt": "hi"})):
        for ignored in ({"stream_options": {"include_usage": True}}, {"logit_bias": [-0.5, 1]}):
            call = await send(app, request("POST", path, {**body, **ignored}))
            assert call.status == 200, ignored


@pytest.mark.parametrize("body", [b"[]", b"5", b'"x"', b"null"])
async def test_what_is_no_object_is_a_400(body: bytes) -> None:
    assert "object" in (await refused(CHAT, body))["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [*HI, {"role": "robot", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}]}]},
            "messages[0].content[1].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]},
         "messages[0].content[0].refusal"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "assistant", "function_call": {}}]}, "messages[0].function_call.name"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": -1}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"typical_p": 0}, "typical_p"),
        ({"top_k": -2}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": "20"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 10**30}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop[0]"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"1024": 1}}, "logit_bias.1024"),
        ({"logit_bias": {"²": 1}}, "logit_bias.²"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": [1.0]}, "logit_bias"),
        ({"logprobs": 2}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"stop_token_ids": [1024]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [5, -1]}, "stop_token_ids[1]"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids[0]"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"priority": 0.5}, "priority"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"enable_thinking": "no"}, "enable_thinking"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"thinking": {"budget_tokens": -2}}, "thinking.budget_tokens"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}},
         "chat_template_kwargs.add_generation_prompt"),
        ({"tools": [TOOL], "tool_choice": "absent"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [3]}},
         "tool_choice.allowed_tools.tools[0]"),
        ({"tools": [TOOL], "tool_choice": {"type": "banana"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": None}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [TOOL]}}, "tool_choice"),
        ({"tools": [UNENFORCEABLE], "tool_choice": "required"}, "tools"),
        ({"tools": [{"type": "custom"}]}, "tools[0].custom"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "é"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 129}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"functions": [{"name": "a b"}]}, "functions[0].name"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
        ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call"),
        ({"function_call": "auto"}, "function_call"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {}}, "audio"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": NOT, "strict": True}}},
         "response_format"),
        ({"response_format": {"type": "json_object", "schema": CONTRADICTORY}}, "response_format"),
        ({"response_format": {"type": "json_schema", "schema": CONTRADICTORY}}, "response_format"),
        ({"response_format": {"type": "json", "value": "{"}}, "response_format"),
        ({"response_format": {"type": "regex", "value": "(a"}}, "response_format"),
        ({"response_format": {"type": "regex", "value": {}}}, "response_format.value"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": "yes"}}, "structured_outputs.json_object"),
        ({"guided_json": "3"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "start: absent"}, "guided_grammar"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": {"const": 1}, "structured_outputs": {"json": {"const": True}}}, "guided_json"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"truncation_side": "right", "truncate_prompt_tokens": 4}, "truncation_side"),
        ({"grammar": "root ::= absent"}, "grammar"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": {"const": 1}, "regex": "1"}, "json_schema"),
        ({"repetition_detection": {"max_pattern_size": 3}}, "repetition_detection"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"stop_regex": "a+"}, "stop_regex"),
        ({"lora_path": "adapter"}, "lora_path"),
        ({"custom_logit_processor": "x"}, "custom_logit_processor"),
        ({"lora": [{"id": 0, "scale": 1.0}]}, "lora"),
        ({"prompt_token_ids": [1]}, "prompt_token_ids"),
        ({"input_ids": [1]}, "input_ids"),
    ],
)  # fmt: skip
async def test_the_field_at_fault_is_named(fields: dict[str, Any], param: str) -> None:
    error = await refused(CHAT, {"messages": HI, **fields})
    assert error["param"] == param
    assert param.split(".")[0].split("[")[0] in error["message"] or "multiple" in error["message"]


async def test_a_missing_field_is_named() -> None:
    assert await refused(CHAT, {}) == {
        "message": "`messages` is required", "type": "invalid_request_error", "param": "messages",
        "code": None,
    }  # fmt: skip
    assert (await refused("/v1/embeddings", {}))["param"] == "input"


@pytest.mark.parametrize("fields", [{"thinking_token_budget": 5}, {"prompt_embeds": "AAAA"}])
async def test_what_completions_cannot_do_is_refused(fields: dict[str, Any]) -> None:
    error = await refused("/v1/completions", {"prompt": "hi", **fields})
    assert (error["param"], error["code"]) == (next(iter(fields)), "unsupported_parameter")


async def test_messages_say_what_was_given_and_what_is_allowed() -> None:
    error = await refused(CHAT, {"messages": HI, "top_p": 1.3})
    assert error["message"] == "`top_p` must be in [0, 1], got 1.3"
    error = await refused(CHAT, {"messages": HI, "typical_p": 0})
    assert error["message"] == "`typical_p` must be in (0, 1], got 0.0"
    error = await refused(CHAT, {"messages": HI, "top_k": -5})
    assert error["message"] == "`top_k` must be at least -1, got -5"
    error = await refused(CHAT, {"messages": HI, "seed": 2**64})
    assert error["message"] == f"`seed` must be at most {2**64 - 1}, got {2**64}"


async def test_what_is_harmless_is_accepted() -> None:
    engine = ScriptedEngine()
    body = {
        "messages": HI, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"},
        "top_logprobs": 0, "functions": [], "modalities": ["text"], "stop": [], "use_beam_search": False,
        "spaces_between_special_tokens": True, "include_reasoning": False, "stop_token_ids": [],
        "bad_words": [], "truncation_side": "left", "lora": [], "stop_regex": [],
    }  # fmt: skip
    assert (await send(scripted_app(engine), request("POST", CHAT, body))).status == 200


async def test_one_constraint_in_several_fields_is_accepted() -> None:
    # The body of guidance 0.3.1's VLLMModel, with vLLM's old field and its new one.
    grammar = '%llguidance {}\n\nstart: s\ns[capture]: S\n\nS: "a"\n     | "b"\n\n'
    both = {
        "guided_decoding_backend": "guidance",
        "guided_grammar": grammar,
        "structured_outputs": {"grammar": grammar},
    }
    engine = ScriptedEngine()
    assert (await send(scripted_app(engine), request("POST", CHAT, {"messages": HI, **both}))).status == 200
    assert engine.requests[0].grammar is not None
    other = {**both, "structured_outputs": {"grammar": 'start: "a"'}}
    assert (await refused(CHAT, {"messages": HI, **other}))["param"] == "guided_grammar"


@pytest.mark.parametrize(
    ("kind", "value"), [("json", {"type": "object", "maxProperties": 1}), ("choice", ["a", "b"])]
)
async def test_equal_constraints_in_vllms_old_field_and_its_new_one_are_one(kind: str, value: Any) -> None:
    both = {f"guided_{kind}": value, "structured_outputs": {kind: value}}
    engine = ScriptedEngine()
    assert (await send(scripted_app(engine), request("POST", CHAT, {"messages": HI, **both}))).status == 200
    assert engine.requests[0].grammar is not None
    other = {**both, "structured_outputs": {kind: value[::-1] if isinstance(value, list) else {}}}
    assert (await refused(CHAT, {"messages": HI, **other}))["param"] == f"guided_{kind}"


async def test_constraints_nested_to_the_limit_of_a_body_are_refused() -> None:
    """Comparing them may need more of the stack than reading them."""
    app = scripted_app(ScriptedEngine())
    for depth in range(900, 1000):
        nested = '{"a":' * depth + "1" + "}" * depth
        both = f'"guided_json": {nested}, "structured_outputs": {{"json": {nested}}}'
        body = f'{{"messages": [{{"role": "user", "content": "hi"}}], {both}}}'
        assert (await send(app, request("POST", CHAT, body.encode()))).status == 400, depth


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"grammar": 'root ::= "a"{5,5}'}, {"grammar": 'root ::= "a"{5,5}'}),
        ({"json_schema": {"const": "42"}}, {"json": {"const": "42"}}),
        ({"json_schema": '{"const": "42"}'}, {"json": {"const": "42"}}),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_llama_cpps_and_sglangs_constraints_hold(
    path: str, fields: dict[str, Any], same: dict[str, Any]
) -> None:
    engine = ScriptedEngine()
    app = scripted_app(engine)
    prompt = {"messages": HI} if path == CHAT else {"prompt": "hi"}
    for constraint in (fields, {"structured_outputs": same}):
        assert (await send(app, request("POST", path, {**prompt, **constraint}))).status == 200
    first, second = (each.grammar for each in engine.requests)
    assert first is not None and first is second  # the compiler keeps the grammars used last


async def test_an_empty_grammar_of_llama_cpp_is_none() -> None:
    engine = ScriptedEngine()
    body = {"messages": HI, "grammar": ""}
    assert (await send(scripted_app(engine), request("POST", CHAT, body))).status == 200
    assert engine.requests[0].grammar is None


async def test_tools_that_must_not_be_called_are_rendered() -> None:
    engine = ScriptedEngine()
    app = scripted_app(engine, chat_template="{{ tools[0].function.name }}")
    body = {"messages": HI, "tools": [TOOL], "tool_choice": "none"}
    assert (await send(app, request("POST", CHAT, body))).status == 200
    assert engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False) == "f"


async def test_a_template_from_a_request_is_forbidden() -> None:
    call = await send(
        scripted_app(ScriptedEngine()), request("POST", CHAT, {"messages": HI, "chat_template": "x"})
    )
    error = call.json()["error"]
    assert (call.status, error["type"], error["param"]) == (403, "permission_error", "chat_template")


async def test_the_administrators_limits_hold_on_v1() -> None:
    settings = Settings(max_stop_sequences=1, max_best_of=2, max_top_n_tokens=3, max_client_batch_size=2)
    for fields, param in (
        ({"stop": ["a", "b"]}, "stop"), ({"n": 3}, "n"),
        ({"logprobs": True, "top_logprobs": 4}, "top_logprobs"),
    ):  # fmt: skip
        assert (await refused(CHAT, {"messages": HI, **fields}, settings))["param"] == param
    error = await refused("/v1/completions", {"prompt": ["a", "b", "c"]}, settings)
    assert error["message"] == "Number of prompts exceeds the maximum allowed batch size of 2"
    few_logprobs = await refused("/v1/responses", {"input": "hi", "top_logprobs": 4}, settings)
    assert few_logprobs["param"] == "top_logprobs"
    app = scripted_app(ScriptedEngine(), settings)
    for path, body in (
        (CHAT, {"messages": HI, "stop": ["a"], "n": 2, "logprobs": True, "top_logprobs": 3}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
    ):
        assert (await send(app, request("POST", path, body))).status == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": ["a"] * 5}, "`stop`"),
        ({"n": 3}, "`n`"),
        ({"logprobs": True, "top_logprobs": 6}, "`top_logprobs`"),
    ],
)
async def test_compat_has_tgis_limits(fields: dict[str, Any], message: str) -> None:
    app = scripted_app(ScriptedEngine(), Settings(tgi_compat=True))
    call = await send(app, request("POST", CHAT, {"messages": HI, **fields}))
    assert call.status == 422
    assert message in call.json()["error"]


@pytest.mark.parametrize("given", [{"type": "text"}, {"type": "json", "value": {"type": "object"}}])
async def test_compat_refuses_tools_with_a_grammar_in_tgis_words(given: dict[str, Any]) -> None:
    app = scripted_app(ScriptedEngine(), Settings(tgi_compat=True))
    body = {"messages": HI, "tools": [], "response_format": given}
    call = await send(app, request("POST", CHAT, body))
    assert call.status == 422
    assert (
        call.content
        == json.dumps(
            {"error": "Tool error: Grammar and tools are mutually exclusive", "error_type": "tool_error"},
            separators=(",", ":"),
        ).encode()
    )


@pytest.mark.parametrize("padding", [0, 300_000])
async def test_no_depth_of_nesting_is_a_500(padding: int) -> None:
    app = scripted_app(ScriptedEngine(), chat_template="{{ tools | tojson }}{{ documents }}{{ x | tojson }}")
    limit = sys.getrecursionlimit()
    for depth in (10, *range(limit - 120, limit + 20, 3), 10 * limit):
        nested = b"[" * depth + b"]" * depth
        body = (
            b'{"messages":[{"role":"user","content":"hi"}],"tool_choice":"none","user":"%b","tools":'
            b'[{"type":"function","function":{"name":"f","parameters":{"a":%b}}}],'
            b'"chat_template_kwargs":{"x":%b},"documents":[{"a":%b}]}'
        ) % (b"x" * padding, nested, nested, nested)
        call = await send(app, request("POST", CHAT, body))
        assert call.status < 500, depth


@pytest.mark.parametrize("path", [CHAT, "/api/chat", "/tokenize"])
async def test_no_depth_of_a_call_in_the_history_is_a_500(path: str) -> None:
    """What the decoder barely accepts must not be copied deeper in the stack."""
    app = scripted_app(ScriptedEngine())
    limit = sys.getrecursionlimit()
    for depth in range(limit - 140, limit):
        arguments = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
        called = b'{"role":"assistant","tool_calls":[{"id":"1","function":{"name":"f","arguments":%b}}]}'
        body = b'{"stream":false,"messages":[' + called % arguments + b"]}"
        assert (await send(app, request("POST", path, body))).status < 500, depth


@pytest.mark.parametrize(
    ("field", "most", "more"),
    [
        ("logit_bias", {str(i): 1 for i in range(1024)}, None),
        ("stop_token_ids", list(range(1024)), [*range(1024), 0]),
    ],
)
async def test_lists_of_tokens_have_a_greatest_length(field: str, most: object, more: object) -> None:
    """`logit_bias` cannot exceed the limit here: the toy model has only 1,024 tokens."""
    for value, status in ((most, 200), (more, 400)):
        if value is not None:
            body = {"messages": [{"role": "user", "content": "hi"}], field: value}
            call = await send(scripted_app(ScriptedEngine()), request("POST", "/v1/chat/completions", body))
            assert call.status == status


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/generate"])
async def test_tokens_that_only_the_tokenizer_knows_are_refused(path: str) -> None:
    """Checkpoints exist whose tokenizer was extended, but not their embedding."""
    engine = ScriptedEngine()
    [unknown] = engine.tokenizer.encode("b", add_special_tokens=False)
    app = scripted_app(engine, info=toy_info(vocab_size=unknown))
    bodies = {CHAT: {"messages": HI}, "/v1/completions": {"prompt": "abc"}, "/generate": {"inputs": "abc"}}
    call = await send(app, request("POST", path, bodies[path]))
    assert call.status == (422 if path == "/generate" else 400)
    assert "but the model has only" in call.content.decode()
    assert engine.channels == []
    assert engine.num_permits == 128
