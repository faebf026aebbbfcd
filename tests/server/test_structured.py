"""Structured outputs and tool calls on the demonstration model, which is too small to do more."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.server.conftest import run_node
from tests.server.test_tgi_clients import require_client
from tests.support.schemas import check as check_json
from tests.support.schemas import random_schema
from tests.support.server_process import ServerProcess

REGEXES = [r"[A-Z][a-z]{2,8}, \d{4}-\d{2}-\d{2}", r"(\+\d{1,3} )?\d{3}-\d{4}", "(yes|no)!{1,3}"]
ASK: list[Any] = [{"role": "user", "content": "Fill in the form for a new customer."}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 20},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture
def url(demo: ServerProcess) -> str:
    return demo.url + "/v1"


@pytest.fixture
def claude(demo: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=demo.url, api_key="-", max_retries=0) as claude:
        yield claude


async def answer(
    client: AsyncOpenAI, *, stream: bool, max_tokens: int = 200, **options: Any
) -> tuple[str, str]:
    """Return an answer's text and its finish reason."""
    options = {"model": "tgi", "messages": ASK, "max_tokens": 200, **options}
    if not stream:
        whole = await client.chat.completions.create(**options)
        return whole.choices[0].message.content or "", whole.choices[0].finish_reason
    text, reason = "", ""
    async for chunk in await client.chat.completions.create(stream=True, **options):
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    return text, reason


@pytest.mark.parametrize("num_schemas", [8, pytest.param(200, marks=pytest.mark.soak)])
async def test_answers_to_random_schemas_validate(url: str, num_schemas: int) -> None:
    schemas = [random_schema(random.Random(seed)) for seed in range(num_schemas)]
    at_once = asyncio.Semaphore(32)

    async def check(client: AsyncOpenAI, index: int, schema: dict[str, Any]) -> bool:
        form: Any = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema, "strict": True}}
        options = {"temperature": index // 2 % 2, "seed": index, "response_format": form}
        async with at_once:
            text, reason = await answer(client, stream=index % 2 == 0, **options)
        if reason == "stop":
            check_json(text, schema)
        return reason == "stop"

    async with AsyncOpenAI(base_url=url, api_key="-", timeout=300) as client:
        ended = await asyncio.gather(*(check(client, *pair) for pair in enumerate(schemas)))
    assert sum(ended) > num_schemas // 2  # `length` cut the others


async def test_answers_match_regexes_and_choices(url: str) -> None:
    async with AsyncOpenAI(base_url=url, api_key="-", timeout=300) as client:
        for temperature in (0, 1):
            answers = await asyncio.gather(
                *(
                    answer(
                        client,
                        stream=bool(temperature),
                        temperature=temperature,
                        extra_body={"structured_outputs": {"regex": pattern}},
                    )
                    for pattern in REGEXES
                ),
                answer(client, stream=True, extra_body={"guided_choice": ["positive", "negative"]}),
            )
            for pattern, (text, reason) in zip([*REGEXES, "positive|negative"], answers, strict=True):
                assert re.fullmatch(pattern, text) and reason == "stop", (pattern, text)


def test_json_mode_and_the_sdk_s_parse(client: OpenAI) -> None:
    class Customer(BaseModel):
        name: str
        age: int

    parsed = client.chat.completions.parse(
        model="tgi", messages=ASK, response_format=Customer, max_tokens=300, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Customer)
    form: Any = {"type": "json_object"}
    text = client.chat.completions.create(
        model="tgi", messages=ASK, response_format=form, max_tokens=300, temperature=0
    )
    assert isinstance(json.loads(text.choices[0].message.content or ""), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_that_must_be_made_are_made_with_valid_arguments(client: OpenAI, choice: Any) -> None:
    options: dict[str, Any] = {
        "model": "tgi", "messages": ASK, "tools": TOOLS, "tool_choice": choice, "max_tokens": 200,
        "temperature": 0, "parallel_tool_calls": False,
    }  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0]
    with client.chat.completions.stream(**options) as stream:
        streamed = stream.get_final_completion().choices[0]
    arguments = []
    for one in (whole, streamed):
        assert one.finish_reason == ("tool_calls" if choice == "required" else "stop")
        assert one.message.tool_calls is not None
        (call,) = one.message.tool_calls
        assert call.type == "function"
        if call.function.name == "weather":
            jsonschema.validate(json.loads(call.function.arguments), WEATHER)
        else:
            assert call.function.arguments == "{}"
        arguments.append(call.function.arguments)
    assert arguments[0] == arguments[1]


def test_a_model_that_was_not_trained_for_tools_is_held_to_one_call(client: OpenAI) -> None:
    """It would repeat itself for as long as it may only make calls."""
    options: dict[str, Any] = {
        "model": "tgi", "messages": ASK, "tools": TOOLS, "tool_choice": "required", "max_tokens": 400,
        "temperature": 0,
    }  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0]
    with client.chat.completions.stream(**options) as stream:
        streamed = stream.get_final_completion().choices[0]
    for one in (whole, streamed):
        assert one.finish_reason == "tool_calls"
        assert one.message.tool_calls is not None and len(one.message.tool_calls) == 1


def test_a_loop_over_tools_comes_to_its_end(client: OpenAI) -> None:
    messages = list(ASK)
    for turn in range(2):
        message = (
            client.chat.completions.create(
                model="tgi",
                messages=messages,
                tools=TOOLS,
                tool_choice="auto" if turn else "required",
                parallel_tool_calls=False,
                max_tokens=60,
                temperature=0,
            )
            .choices[0]
            .message
        )
        messages.append(message)
        for call in message.tool_calls or ():
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "It is 20 C and noon."})
    assert messages[-1] is message
    assert message.content or message.tool_calls


async def test_an_unconstrained_stream_is_the_same_beside_constrained_ones(url: str) -> None:
    async with AsyncOpenAI(base_url=url, api_key="-", timeout=300) as client:
        options: dict[str, Any] = {
            "stream": True,
            "temperature": 1,
            "seed": 3,
            "extra_body": {"min_tokens": 20},
        }
        alone = await answer(client, **options)
        bound = {**options, "response_format": {"type": "json_object"}}
        together = await asyncio.gather(*(answer(client, **each) for each in (options, bound, bound, bound)))
    assert together[0] == alone


def test_hostile_grammars_are_refused_and_the_server_lives(client: OpenAI) -> None:
    for body in (
        {"guided_regex": "(" * 3000 + "a" + ")" * 3000},
        {"guided_grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(20_000))},
        {"guided_choice": ["x" * 20] * 50_000},
        {"guided_json": {"type": "integer", "minimum": 5, "maximum": 4}},
    ):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="tgi", messages=ASK, max_tokens=5, extra_body=body)
    assert client.chat.completions.create(model="tgi", messages=ASK, max_tokens=1).choices


def test_the_sdk_for_node(url: str) -> None:
    found = run_node("tools.mjs", url)
    assert found["called"]
    assert found["typedCalls"]
    by_zod = (found["typed"], found["written"], *found["typedCalls"])
    for arguments in (
        *found["called"],
        *found["streamed"],
        found["parsed"],
        found["response"][0][1],
        *by_zod,
    ):
        assert set(arguments) == {"city", "days"} and 1 <= arguments["days"] <= 9
    assert found["reason"] == "tool_calls"
    assert (found["first"], found["last"]) == ("response.created", "response.completed")
    assert found["response"][0][0] == "function_call"


def test_responses_through_the_sdk(client: OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "weather", "schema": WEATHER, "strict": True}}
    with client.responses.stream(model="tgi", input="Paris?", text=form, max_output_tokens=150) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        response = stream.get_final_response()
    assert text == response.output_text
    jsonschema.validate(json.loads(text), WEATHER)


def test_responses_parsed_into_a_model(client: OpenAI) -> None:
    class Forecast(BaseModel):
        city: str
        days: int

    options: Any = {"model": "tgi", "input": "Paris?", "max_output_tokens": 150, "temperature": 0}
    assert isinstance(client.responses.parse(text_format=Forecast, **options).output_parsed, Forecast)
    tools: Any = [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}]
    with client.responses.stream(
        tools=tools, tool_choice="required", parallel_tool_calls=False, **options
    ) as s:
        numbers = [event.sequence_number for event in s]
        (call,) = s.get_final_response().output
    assert numbers == list(range(len(numbers)))
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), WEATHER)


def test_anthropic_s_sdk_calls_tools(claude: anthropic.Anthropic) -> None:
    called: list[dict[str, Any]] = []

    @anthropic.beta_tool
    def weather(city: str, days: int) -> str:
        """Tell the weather of a city."""
        called.append({"city": city, "days": days})
        return "20 C"

    options: Any = {"model": "tgi", "max_tokens": 150, "messages": ASK, "extra_body": {"temperature": 0}}
    runner = claude.beta.messages.tool_runner(
        tools=[weather],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_iterations=2,
        **options,
    )
    last = runner.until_done()  # the SDK requests a thread first, is refused, and sends the whole history
    assert last.stop_reason == "tool_use" and called
    assert all(isinstance(call["days"], int) for call in called)
    tools: Any = [{"name": "weather", "input_schema": WEATHER}]
    with claude.messages.stream(
        tools=tools, tool_choice={"type": "tool", "name": "weather"}, **options
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content_block_delta"]
        (block,) = stream.get_final_message().content
    assert all(delta.type == "input_json_delta" for delta in deltas)
    parts = "".join(delta.partial_json for delta in deltas if delta.type == "input_json_delta")
    assert block.type == "tool_use" and block.input == json.loads(parts)
    jsonschema.validate(block.input, WEATHER)

    class Forecast(BaseModel):
        city: str
        days: int

    assert isinstance(claude.messages.parse(output_format=Forecast, **options).parsed_output, Forecast)


@pytest.mark.thorough
def test_langchain_binds_tools_and_types(url: str) -> None:
    run = subprocess.run(
        [require_client("python"), Path(__file__).parent / "tgi_clients" / "langchain_tools.py", url],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    for call in (*found["called"], *found["streamed"]):
        assert call["name"] == "weather" and isinstance(call["args"]["city"], str)
        assert call["id"].startswith("call_")
    assert found["called"] and found["streamed"] and found["loop"] == ["human", "ai", "tool", "ai"]
    for value in found["typed"]:
        assert isinstance(value["city"], str) and isinstance(value["days"], int)
