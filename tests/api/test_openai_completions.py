"""`POST /v1/completions`: prompt forms, echo, scoring, best_of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from tests.support.asgi import Call, request, send
from tests.support.scripted_engine import LOGPROB, ScriptedChannel, ScriptedEngine, say, scripted_app
from tests.support.toy_tokenizer import BOS, EOS, ToyTokenizer
from tgi_asgi.errors import TgiError
from tgi_asgi.settings import Settings
from tgi_asgi.types import FinishReason, TokenEvent


async def complete(
    engine: ScriptedEngine | None = None, /, settings: Settings | None = None, **fields: Any
) -> Call:
    app = scripted_app(engine or ScriptedEngine(), settings)
    return await send(app, request("POST", "/v1/completions", fields))


async def test_a_whole_answer() -> None:
    body = (await complete(ScriptedEngine(say("a", "b")), prompt="xyz", model="m")).json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "m",
        "system_fingerprint": "fp_toy",
        "choices": [
            {"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
        ],
        "usage": {
            "prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }  # fmt: skip


async def test_the_headers_sum_the_prompts_up() -> None:
    """They are TGI's, which omits `x-compute-time` on this route."""
    call = await complete(ScriptedEngine(say("a", "b")), prompt=["xyz", "x"])
    found = call.headers
    assert (found["x-compute-characters"], found["x-prompt-tokens"]) == ("4", "4")
    assert found["x-generated-tokens"] == "6"
    assert "x-total-time" in found and "x-compute-time" not in found


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
async def test_every_form_of_prompt(prompt: Any, expected: list[list[int]]) -> None:
    engine = ScriptedEngine()
    body = (await complete(engine, prompt=prompt)).json()
    assert [list(got.prompt_ids) for got in engine.requests] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_texts_get_the_tokenizers_bos_and_ids_do_not() -> None:
    engine = ScriptedEngine()
    engine.tokenizer = ToyTokenizer(adds_bos=True)
    await complete(engine, prompt="a")
    await complete(engine, prompt=[97])
    await complete(engine, prompt="a", add_special_tokens=False)
    await complete(engine, prompt="")
    assert [list(got.prompt_ids) for got in engine.requests] == [[BOS, 97], [97], [97], [BOS]]


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ([[]], "prompt[0]"),
        (["a", 1], "prompt[1]"),
        (["a", [1]], "prompt[1]"),
        ([1, "a"], "prompt[1]"),
        ([[1], "a"], "prompt[1]"),
        ([1, 1024], "prompt[1]"),
        ([-1], "prompt[0]"),
        ([True], "prompt[0]"),
        ([1.5], "prompt[0]"),
        ([[1], [2, None]], "prompt[1][1]"),
        ([{}], "prompt[0]"),
        ([None], "prompt[0]"),
        (5, "prompt"),
    ],
)
async def test_prompts_that_are_refused(prompt: Any, param: str) -> None:
    engine = ScriptedEngine()
    call = await complete(engine, prompt=prompt)
    assert (call.status, call.json()["error"]["param"]) == (400, param)
    assert engine.channels == []
    assert engine.num_permits == 128


@pytest.mark.parametrize(
    ("given", "texts"),
    [({}, [""]), ({"prompt": None}, [""]), ({"prompt": ""}, [""]), ({"prompt": ["a", ""]}, ["a", ""])],
)
@pytest.mark.parametrize(
    ("bos", "add_special_tokens", "first"), [(BOS, None, BOS), (BOS, False, BOS), (None, None, EOS)]
)
async def test_an_empty_prompt_is_the_beginning_of_a_document(
    given: dict[str, Any], texts: list[str], bos: int | None, add_special_tokens: bool | None, first: int
) -> None:
    engine = ScriptedEngine(say("b"))
    engine.tokenizer.bos_id = bos
    fields: dict[str, Any] = {**given, "add_special_tokens": add_special_tokens, "echo": True, "logprobs": 0}
    body = (await complete(engine, **fields)).json()
    assert [list(got.prompt_ids) for got in engine.requests] == [[97] if text else [first] for text in texts]
    assert [choice["text"] for choice in body["choices"]] == [text + "b" for text in texts]
    assert [choice["logprobs"]["text_offset"][0] for choice in body["choices"]] == [0] * len(texts)
    assert body["usage"]["prompt_tokens"] == len(texts)


@pytest.mark.parametrize("is_compat", [False, True])
@pytest.mark.parametrize("given", [{}, {"prompt": None}, {"prompt": ""}, {"prompt": ["a", ""]}])
async def test_it_is_refused_without_such_a_token_and_under_compat(
    given: dict[str, Any], is_compat: bool
) -> None:
    engine = ScriptedEngine()
    if not is_compat:
        engine.tokenizer.bos_id = engine.tokenizer.eos_id = None
    call = await complete(engine, Settings(tgi_compat=is_compat), **given)
    assert call.status == (422 if is_compat else 400)
    assert any(rule in str(call.json()["error"]) for rule in ("is required", "must not be empty"))
    assert engine.channels == []


@pytest.mark.parametrize("name", ["messages", "input", "inputs"])
async def test_another_api_s_body_is_not_taken_for_an_empty_prompt(name: str) -> None:
    fields: dict[str, Any] = {name: [{"role": "user", "content": "hi"}]}
    call = await complete(**fields)
    assert (call.status, call.json()["error"]["param"]) == (400, name)
    assert (await complete(**fields, prompt="hi")).status == 200


async def test_equal_prompts_without_a_seed_are_sampled_differently() -> None:
    engine = ScriptedEngine()
    await complete(engine, prompt=["a", "a"])
    assert engine.requests[0].sampling.seed != engine.requests[1].sampling.seed
    engine = ScriptedEngine()
    await complete(engine, prompt=["a", "a"], seed=7)
    assert [got.sampling.seed for got in engine.requests] == [7, 7]


async def test_what_prompts_share_is_read_once() -> None:
    """A small body may hold 128 prompts and 1,024 biases."""
    engine = ScriptedEngine()
    await complete(engine, prompt=["a", "b"], logit_bias={"97": 5})
    first, second = (request.sampling.logit_bias for request in engine.requests)
    assert first == ((97, 5.0),) and first is second


async def test_max_tokens_defaults_to_16_and_to_the_context_under_compat() -> None:
    engine = ScriptedEngine()
    await complete(engine, prompt="abc")
    await complete(engine, prompt="abc", max_tokens=None)
    await complete(engine, Settings(tgi_compat=True), prompt="abc")
    await complete(engine, prompt="x" * 505)
    assert [got.stop.max_tokens for got in engine.requests] == [16, 16, 509, 7]


async def test_context_overflow_speaks_of_the_prompt() -> None:
    call = await complete(prompt="abc", max_tokens=510)
    assert call.json()["error"] == {
        "message": "This model's maximum context length is 512 tokens. However, you requested 510 output "
        "tokens and your prompt contains at least 3 input tokens, for a total of at least 513 tokens (3 in "
        "the prompt, 510 in the completion). Please reduce the length of the input prompt or the number of "
        "requested output tokens. "
        "(context_length_exceeded: your input exceeds the context window of this model)",
        "type": "invalid_request_error", "param": "prompt", "code": "context_length_exceeded",
    }  # fmt: skip


async def test_compat_accepts_by_tgis_rule_and_cuts_at_the_context() -> None:
    engine = ScriptedEngine()
    assert (await complete(engine, Settings(tgi_compat=True), prompt="abc", max_tokens=509)).status == 200
    call = await complete(engine, Settings(tgi_compat=True), prompt="abc", max_tokens=510)
    assert call.status == 422
    assert "`inputs` tokens + `max_new_tokens` must be <= 512" in call.json()["error"]


async def test_n_choices_are_numbered_within_their_prompt() -> None:
    engine = ScriptedEngine(say("a"))
    body = (await complete(engine, prompt=["x", "y", "z"], n=2)).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 12
    assert engine.num_permits == 128


async def test_one_bad_prompt_fails_the_call_and_frees_the_rest() -> None:
    engine = ScriptedEngine()
    call = await complete(engine, prompt=["a", "b" * 600])
    assert call.json()["error"]["code"] == "context_length_exceeded"
    assert engine.channels == []
    assert engine.num_permits == 128


async def test_permits_are_taken_for_all_prompts_or_none() -> None:
    engine = ScriptedEngine(num_permits=5)
    assert (await complete(engine, prompt=["a", "b", "c"], n=2)).status == 429
    assert engine.num_permits == 5


async def test_more_choices_than_the_server_has_room_for_are_the_clients_error() -> None:
    call = await complete(settings=Settings(max_concurrent_requests=4), prompt=["a"] * 3, n=2)
    assert call.status == 400


async def test_echo_puts_the_prompt_before_each_text() -> None:
    body = (await complete(ScriptedEngine(say("c")), prompt=["ab", "x"], echo=True, n=2)).json()
    assert [choice["text"] for choice in body["choices"]] == ["abc", "abc", "xc", "xc"]
    body = (await complete(ScriptedEngine(say("c")), prompt=[97, 98], echo=True)).json()
    assert body["choices"][0]["text"] == "abc"
    for skips, shown in ((None, "ac"), (True, "ac"), (False, "</s>ac")):
        engine = ScriptedEngine(say("c", finish=None))
        fields: dict[str, Any] = {"prompt": [EOS, 97], "echo": True, "max_tokens": 1}
        body = (await complete(engine, **fields, skip_special_tokens=skips)).json()
        assert body["choices"][0]["text"] == shown


async def test_log_probabilities_have_the_legacy_shape_and_keep_eos() -> None:
    body = (await complete(ScriptedEngine(say("c", "dd")), prompt="ab", logprobs=2)).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["c", "dd", "</s>"]
    assert logprobs["token_logprobs"] == [LOGPROB] * 3
    assert logprobs["text_offset"] == [2, 3, 5]
    assert [list(top) for top in logprobs["top_logprobs"]] == [["c", "a"], ["dd", "a"], ["</s>", "a"]]
    assert len(logprobs["tokens"]) == body["usage"]["completion_tokens"]


async def test_zero_logprobs_are_the_sampled_tokens_alone() -> None:
    engine = ScriptedEngine(say("c"))
    logprobs = (await complete(engine, prompt="ab", logprobs=0)).json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [LOGPROB, LOGPROB]
    assert logprobs["top_logprobs"] is None


async def test_scoring_as_lm_eval_does_it() -> None:
    engine = ScriptedEngine(say("c", "d"))
    prompt = [104, 105, 33]
    body = (
        await complete(engine, prompt=[prompt], temperature=0, max_tokens=1, logprobs=1, echo=True, seed=1234)
    ).json()
    [choice] = body["choices"]
    assert choice["text"] == "hi!c"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["h", "i", "!", "c"]
    assert logprobs["token_logprobs"] == [None, LOGPROB, LOGPROB, LOGPROB]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    # lm-eval's parse_logprobs reads these.
    for value, top in zip(logprobs["token_logprobs"][1:-1], logprobs["top_logprobs"][1:-1], strict=True):
        assert value == max(top.values())
    got = engine.requests[0]
    assert (got.prompt_logprobs, got.needs_all) == (1, True)


async def test_max_tokens_0_scores_the_prompt_and_shows_no_token() -> None:
    for is_stream in (False, True):
        engine = ScriptedEngine(say("c"))
        call = await complete(engine, prompt="hi", max_tokens=0, logprobs=1, echo=True, stream=is_stream)
        assert call.status == 200
        if is_stream:
            assert b'"c"' not in call.content
            continue
        body = call.json()
        [choice] = body["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
        assert choice["logprobs"]["tokens"] == ["h", "i"]
        assert body["usage"]["completion_tokens"] == 0


async def test_max_tokens_0_without_echo_has_no_log_probabilities() -> None:
    body = (await complete(ScriptedEngine(say("c")), prompt="hi", max_tokens=0, logprobs=1)).json()
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    assert body["choices"][0]["logprobs"] == {name: [] for name in names}


async def test_the_token_that_max_tokens_0_hides_gives_no_reason_to_stop() -> None:
    for is_stream in (False, True):
        engine = ScriptedEngine(say("c"))
        call = await complete(engine, prompt="hi", max_tokens=0, stop_token_ids=[ord("c")], stream=is_stream)
        assert b'"finish_reason":"length","stop_reason":null' in call.content


async def graded(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
    """Generate each choice's number; the mean log-probability is best for choice 1, then 2, then 0."""
    for i, logprob in enumerate((-3.0, -0.1, -1.0)):
        yield [
            TokenEvent(i, 48 + i, b"%d" % i, str(i), logprob),
            TokenEvent(i, 257, b"", "", logprob, finish=FinishReason.EOS),
        ]


async def test_best_of_returns_the_likeliest() -> None:
    engine = ScriptedEngine(graded)
    body = (await complete(engine, prompt="x", best_of=3, n=2)).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "1"), (1, "2")]
    assert body["usage"]["completion_tokens"] == 6
    assert body["choices"][0]["logprobs"] is None
    assert (engine.requests[0].n, engine.requests[0].sampling.logprobs) == (3, 0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "n": 1, "stream": True}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
    ],
)
async def test_refusals(fields: dict[str, Any], param: str) -> None:
    call = await complete(**{"prompt": "x", **fields})
    assert (call.status, call.json()["error"]["param"]) == (400, param)


async def test_an_empty_suffix_and_best_of_n_are_fine() -> None:
    assert (await complete(prompt="x", suffix="", best_of=1, stream=True)).status == 200


@pytest.mark.parametrize(
    ("fields", "error", "error_type"),
    [
        (
            {"prompt": "a", "suffix": "b"},
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
            "suffix not supported",
        ),
        (
            {"prompt": ["a"] * 5},
            "Number of prompts exceeds the maximum allowed batch size of 4",
            "batch size exceeded",
        ),
    ],
)
async def test_compat_has_tgis_names_for_these_two(
    fields: dict[str, Any], error: str, error_type: str
) -> None:
    app = scripted_app(ScriptedEngine(), Settings(tgi_compat=True))
    call = await send(app, request("POST", "/v1/completions", fields))
    assert call.status == 422
    assert call.json() == {"error": error, "error_type": error_type}


async def test_the_headers_of_a_scored_prompt_count_no_token() -> None:
    call = await complete(prompt="xyz", max_tokens=0, echo=True, logprobs=1)
    assert call.json()["usage"]["completion_tokens"] == 0
    assert call.headers["x-generated-tokens"] == "0"
