"""TGI's validation: its messages, their order and timing, and the request that the engine receives."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.support.asgi import request, send
from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, say, scripted_app, toy_info
from tgi_asgi.api.tgi.request import native_grammar
from tgi_asgi.api.tgi.schema import Grammar
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import Settings
from tgi_asgi.types import GenerationRequest, LogprobsMode

PREFIX = "Input validation error: "


def generation(
    body: dict[str, Any], *, is_stream: bool = False, prompt: int = 3, **settings: Any
) -> GenerationRequest:
    """Return the engine's request for a prompt of `prompt` tokens; raise if the server refuses it."""
    engine = ScriptedEngine()
    info = toy_info(max_input_tokens=2047, max_total_tokens=2048)
    path = "/generate_stream" if is_stream else "/generate"
    call = request("POST", path, {**body, "inputs": ("abcde" * prompt)[:prompt]})
    asyncio.run(send(scripted_app(engine, Settings(**settings), info=info), call))
    if call.status != 200:
        raise InvalidRequest(call.json()["error"])
    return engine.requests[0]


def parameters(**given: Any) -> dict[str, Any]:
    return {"inputs": "x", "parameters": given}


async def post(body: Any, path: str = "/generate", **settings: Any) -> httpx.Response:
    async with client_of(scripted_app(ScriptedEngine(), Settings(**settings))) as client:
        return await client.post(path, json=body)


MESSAGES = [
    ({"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"temperature": 0}, "`temperature` must be strictly positive"),
    ({"temperature": -1.5}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"frequency_penalty": -2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -1}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 511. Given: 0"),
    ({"truncate": 512}, "`truncate` must be strictly positive and less than 511. Given: 512"),
    (
        {"max_new_tokens": 512},
        "`inputs` tokens + `max_new_tokens` must be <= 512. "
        "Given: 1 `inputs` tokens and 512 `max_new_tokens`",
    ),
]


@pytest.mark.parametrize(("given", "message"), MESSAGES, ids=str)
async def test_a_value_out_of_range_is_refused_in_tgis_words(given: dict[str, Any], message: str) -> None:
    response = await post(parameters(**given))
    assert response.status_code == 422
    assert response.json() == {"error": PREFIX + message, "error_type": "validation"}


async def test_of_several_wrong_values_the_first_in_tgis_order_is_reported() -> None:
    # Each entry breaks one more rule than the next; removing the first reports the second.
    wrong = {
        "temperature": 0, "repetition_penalty": 0, "frequency_penalty": 3, "top_p": 1, "typical_p": 1,
        "top_k": 0, "max_new_tokens": 0, "stop": list("abcde"), "top_n_tokens": 9, "truncate": 0,
    }  # fmt: skip
    while wrong:
        error = (await post(parameters(**wrong))).json()["error"]
        assert f"`{next(iter(wrong))}`" in error
        del wrong[next(iter(wrong))]


async def test_an_empty_prompt_is_refused_after_the_parameters() -> None:
    assert (await post({"inputs": ""})).json()["error"] == PREFIX + "`inputs` cannot be empty"
    response = await post({"inputs": "", "parameters": {"top_k": 0, "truncate": 0}})
    assert "`top_k`" in response.json()["error"]
    response = await post({"inputs": "", "parameters": {"truncate": 0}})
    assert "`inputs`" in response.json()["error"]


async def test_best_of_is_refused_altogether_where_the_administrator_allows_one() -> None:
    response = await post(parameters(best_of=2, do_sample=True), max_best_of=1)
    assert response.json()["error"] == PREFIX + "`best_of` != 1 is not allowed for this endpoint"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"best_of": 2, "temperature": 0}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
        (
            {"decoder_input_details": True, "top_k": 0},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ],
    ids=str,
)
async def test_streams_refuse_what_they_cannot_show_with_a_true_status(
    given: dict[str, Any], message: str
) -> None:
    response = await post(parameters(**given), "/generate_stream")
    assert (response.status_code, response.json()["error"]) == (422, PREFIX + message)


async def test_overload_wins_over_wrong_values_but_not_over_best_of() -> None:
    app = scripted_app(ScriptedEngine(num_permits=0))
    async with client_of(app) as client:
        response = await client.post("/generate", json=parameters(temperature=0))
        assert (response.status_code, response.json()) == (
            429,
            {"error": "Model is overloaded", "error_type": "overloaded"},
        )
        assert int(response.headers["retry-after"]) > 0
        response = await client.post("/generate", json=parameters(best_of=9))
        assert response.status_code == 422


async def test_a_refused_request_gives_its_permits_back() -> None:
    engine = ScriptedEngine(num_permits=2)
    app = scripted_app(engine)
    async with client_of(app) as client:
        for body in (parameters(temperature=0), parameters(max_new_tokens=1000), {"inputs": ""}):
            assert (await client.post("/generate", json=body)).status_code == 422
            assert engine.num_permits == 2
        body = parameters(best_of=2, do_sample=True)
        assert (await client.post("/generate", json=body)).status_code == 200
        assert engine.num_permits == 2


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "inputs"),
        ({"inputs": None}, "inputs"),
        ({"inputs": 1}, "inputs"),
        (parameters(max_new_tokens=10.0), "parameters.max_new_tokens"),
        (parameters(max_new_tokens="10"), "parameters.max_new_tokens"),
        (parameters(max_new_tokens=True), "parameters.max_new_tokens"),
        (parameters(do_sample="yes"), "parameters.do_sample"),
        (parameters(stop="\n"), "parameters.stop"),
        (parameters(stop=["a", 1]), "parameters.stop[1]"),
        (parameters(seed=-1), "parameters.seed"),
        (parameters(seed=2**64), "parameters.seed"),
        (parameters(grammar={"type": "json"}), "parameters.grammar.value"),
        ({"inputs": "x", "parameters": []}, "parameters"),
    ],
    ids=str,
)
async def test_a_wrong_type_is_a_422_that_names_the_field(body: Any, path: str) -> None:
    response = await post(body)
    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"
    assert path in response.json()["error"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"inputs": "\xff"}', b"[" * 100_000, b'{"inputs": NaN}'])
async def test_what_is_no_json_is_a_400(content: bytes) -> None:
    app = scripted_app(ScriptedEngine())
    async with client_of(app) as client:
        response = await client.post(
            "/generate", content=content, headers={"content-type": "application/json"}
        )
    # An array is JSON of the wrong type, and only its start is read.
    assert response.status_code == (422 if content.startswith(b"[") else 400)
    assert response.json()["error_type"] == "validation"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_another_media_type_is_a_415(content_type: str | None) -> None:
    app = scripted_app(ScriptedEngine())
    headers = {"content-type": content_type} if content_type else {}
    async with client_of(app) as client:
        response = await client.post("/generate", content=b'{"inputs": "x"}', headers=headers)
    assert response.status_code == 415


def test_null_is_the_default_and_unknown_fields_are_ignored() -> None:
    fields = (
        "adapter_id best_of temperature repetition_penalty frequency_penalty top_k top_p typical_p do_sample "
        "max_new_tokens return_full_text stop truncate watermark details decoder_input_details seed "
        "top_n_tokens grammar"
    )
    nulls = dict.fromkeys(fields.split())
    got = generation({"inputs": "x", "parameters": {**nulls, "stop_sequences": ["a"]}, "more": [{}]})
    assert got.sampling.temperature == 0
    assert got.stop.stop == ()
    assert got.stop.max_tokens == 2045


@pytest.mark.parametrize(
    ("given", "is_greedy"),
    [
        (None, False),
        ({}, True),
        ({"do_sample": False}, True),
        ({"do_sample": True}, False),
        ({"temperature": 1.0}, True),
        ({"temperature": 0.5}, False),
        ({"top_k": 5}, False),
        ({"top_p": 0.5}, False),
        ({"typical_p": 0.5}, False),
        ({"seed": 1}, True),
    ],
    ids=str,
)
def test_sampling_follows_tgis_rule(given: dict[str, Any] | None, is_greedy: bool) -> None:
    body = {"inputs": "x"} if given is None else parameters(**given)
    assert (generation(body).sampling.temperature == 0) is is_greedy


def test_parameters_reach_the_engine() -> None:
    got = generation(
        parameters(
            temperature=0.7, top_k=5000, top_p=0.9, typical_p=0.8, repetition_penalty=1.2,
            frequency_penalty=-1, seed=2**64 - 1, max_new_tokens=7, stop=["a", "b"], top_n_tokens=2,
            details=True,
        )
    )  # fmt: skip
    sampling = got.sampling
    assert (sampling.temperature, sampling.top_p, sampling.typical_p) == (0.7, 0.9, 0.8)
    assert (sampling.repetition_penalty, sampling.frequency_penalty) == (1.2, -1.0)
    assert sampling.top_k == 1024  # capped at the vocabulary size
    assert sampling.seed == (2**64 - 1) % 2**63  # the engine's have a bit less
    assert (sampling.logprobs, sampling.logprobs_mode) == (2, LogprobsMode.PROCESSED)
    assert (got.stop.max_tokens, got.stop.stop, got.stop.include_stop) == (7, ("a", "b"), True)


def test_a_random_seed_survives_javascript() -> None:
    assert all(generation({"inputs": "x"}).sampling.seed < 2**53 for _ in range(50))


def test_extreme_factors_stay_finite_in_float32() -> None:
    sampling = generation(parameters(temperature=1e-300, repetition_penalty=1e300)).sampling
    assert sampling.temperature >= 1e-6
    assert sampling.repetition_penalty <= 1e6


@pytest.mark.parametrize(
    ("prompt", "asked", "given"),
    [
        (10, None, 2038),  # fills the context
        (10, 1025, 1025),  # exact, unlike TGI's multiples of 1024
        (1000, 100_000, 1048),  # accepted because the first 1024 fit; cut at the end of the context
        (2047, None, 1),
    ],
)
def test_length_follows_tgis_acceptance_rule(prompt: int, asked: int | None, given: int) -> None:
    assert generation(parameters(max_new_tokens=asked), prompt=prompt).stop.max_tokens == given


@pytest.mark.parametrize(
    ("prompt", "asked", "message"),
    [
        (1100, 100_000, "must be <= 2048. Given: 1100 `inputs` tokens and 1024 `max_new_tokens`"),
        (2049, None, "must be <= 2048. Given: 2049 `inputs` tokens and 0 `max_new_tokens`"),
        (2048, None, "`inputs` must have less than 2047 tokens. Given: 2048"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_sizes(prompt: int, asked: int | None, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message.replace("+", r"\+")):
        generation(parameters(max_new_tokens=asked), prompt=prompt)


def test_truncate_keeps_the_end_of_the_prompt() -> None:
    assert bytes(generation(parameters(truncate=2), prompt=5).prompt_ids) == b"de"
    assert len(generation(parameters(truncate=9), prompt=5).prompt_ids) == 5


def test_prefill_logprobs_are_computed_only_where_the_administrator_allows() -> None:
    body = parameters(decoder_input_details=True)
    assert generation(body).prompt_logprobs is None
    allowed = generation(body, enable_prefill_logprobs=True)
    assert allowed.prompt_logprobs == 0
    assert allowed.needs_all


def test_logprobs_are_computed_only_where_they_are_shown() -> None:
    assert generation(parameters()).sampling.logprobs is None
    assert generation(parameters(details=True)).sampling.logprobs == 0
    assert generation(parameters(), is_stream=True).sampling.logprobs == 0
    assert generation(parameters(best_of=2, do_sample=True)).sampling.logprobs == 0


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({"type": "regex", "value": {}}, "grammar is not valid: a regex must be a string"),
        ({"type": "regex", "value": "(a"}, "grammar is not valid: "),
        ({"type": "json", "value": "{"}, "grammar is not valid: "),
        ({"type": "json", "value": 3}, "grammar is not supported"),
        ({"type": "json_schema", "value": {}}, "grammar is not supported"),
        ({"type": "json", "value": {"type": "some"}}, "grammar is not valid: "),
    ],
    ids=str,
)
async def test_a_grammar_that_cannot_be_had_is_refused_in_tgi_s_words(
    grammar: dict[str, Any], message: str
) -> None:
    async with client_of(scripted_app(ScriptedEngine())) as client:
        answer = await client.post("/generate", json=parameters(grammar=grammar))
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(f"Input validation error: {message}")
    assert answer.json()["error_type"] == "validation"


@pytest.mark.parametrize(
    ("grammar", "lark"),
    [
        ({"type": "regex", "value": "a+"}, "start: /a+/"),
        ({"type": "json", "value": {"type": "null"}}, 'start: %json {"type": "null"'),
        ({"type": "json_object", "value": '{"type": "null"}'}, 'start: %json {"type": "null"'),
        ({"type": "json_schema", "value": {"schema": {"type": "null"}}}, 'start: %json {"type": "null"'),
        # As in TGI, keywords that cannot be enforced are no reason to refuse the request.
        ({"type": "json", "value": {"type": "array", "uniqueItems": True}}, 'start: %json {"type": "array"'),
    ],
    ids=str,
)
async def test_a_grammar_of_every_spelling_reaches_the_engine(grammar: dict[str, Any], lark: str) -> None:
    engine = ScriptedEngine()
    async with client_of(scripted_app(engine)) as client:
        assert (await client.post("/generate", json=parameters(grammar=grammar))).status_code == 200
    assert engine.requests[0].grammar is not None
    assert native_grammar(Grammar(**grammar)).lark.startswith(lark)


async def test_an_administrator_may_switch_grammars_off_and_then_they_are_not_looked_at() -> None:
    app = scripted_app(ScriptedEngine(), Settings(model_id="toy/model", disable_grammar_support=True))
    async with client_of(app) as client:
        answer = await client.post("/generate", json=parameters(grammar={"type": "json", "value": "{"}))
    assert answer.status_code == 422
    assert answer.json()["error"] == "Input validation error: grammar is not supported"


def test_an_adapter_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"`adapter_id` is not supported.*my-lora"):
        generation(parameters(adapter_id="my-lora"))


async def test_watermark_is_accepted_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    app = scripted_app(ScriptedEngine(say("a")))
    async with client_of(app) as client:
        for _ in range(3):
            assert (await client.post("/generate", json=parameters(watermark=True))).status_code == 200
    assert [record.message for record in caplog.records if "watermark" in record.message] == [
        "`watermark` is accepted, but texts are not watermarked"
    ]


async def test_a_stop_sequence_has_a_greatest_length() -> None:
    async with client_of(scripted_app(ScriptedEngine())) as client:
        for size, status in ((1024, 200), (1025, 422)):
            body = {"inputs": "hi", "parameters": {"stop": ["x" * size]}}
            response = await client.post("/generate", json=body)
            assert response.status_code == status
    assert "up to 1024 characters" in response.json()["error"]
