"""docs/limits.md against the code: if a limit changes in the code, the page must change too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tgi_asgi.api import asgi, images, limits, parse, pool_call, pooled, sse
from tgi_asgi.api.openai import response_store, responses
from tgi_asgi.engine import delivery, sequence
from tgi_asgi.images import fetch, headers
from tgi_asgi.models.generic.vision import strips
from tgi_asgi.runner import kv
from tgi_asgi.serve import connections, process
from tgi_asgi.settings import MIB, Settings
from tgi_asgi.text.chat import sandbox, time_limit
from tgi_asgi.text.constrain import source
from tgi_asgi.text.tools import arguments

TEXT = (Path(__file__).parents[1] / "docs" / "limits.md").read_text(encoding="utf-8")
OPENAI, COMPAT = (limits.Limits.of(Settings(), is_tgi=is_tgi) for is_tgi in (False, True))


@pytest.mark.parametrize(
    ("row", "values"),
    [
        ("request line and headers", [64 << 10]),
        ("open connections", [process.MAX_FILES]),
        ("silence on a connection", [Settings().keep_alive_timeout_s]),
        ("time for a connection's first request", [connections.HEAD_S]),
        ("time for a TLS handshake", [connections.HANDSHAKE_S, connections.REFUSED_HANDSHAKE_S]),
        ("bytes after a request", [connections.MAX_AHEAD]),
        ("time for a request's body", [asgi.BODY_TIMEOUT_S]),
        ("a reader that lags", [sse.MAX_WAITING_EVENTS, sse.STALL_LIMIT_S]),
        ("size", [Settings().payload_limit // MIB]),
        ("`n`, `best_of`", [OPENAI.best_of, COMPAT.best_of]),
        ("prompts of a call", [OPENAI.prompts, COMPAT.prompts]),
        ("inputs of a call for embeddings or scores", [pool_call.MAX_INPUTS]),
        ("their tokens together", [pooled.MAX_TOKENS]),
        ("prompts times choices", [OPENAI.choices]),
        ("stop strings", [OPENAI.stops, COMPAT.stops]),
        ("length of a stop string", [limits.MAX_STOP_CHARS]),
        ("`stop_token_ids`", [limits.MAX_IDS]),
        ("`logit_bias` entries", [limits.MAX_IDS]),
        ("top log-probabilities", [OPENAI.top_logprobs, COMPAT.top_logprobs]),
        (
            "output of a chat template",
            [sandbox.MAX_CHARS, sandbox.MAX_RANGE, int(time_limit.MAX_CPU_S)],
        ),
        ("choices that run and wait", [Settings().max_concurrent_requests]),
        ("sequences of a step", [Settings().max_batch_size]),
        ("a step's time", [Settings().step_timeout_s]),
        ("`model` and `request_id`", [parse.MAX_ECHOED_CHARS]),
        ("bodies of all unanswered requests", [Settings().max_body_memory // MIB]),
        ("chunks of a body", [asgi.MAX_SMALL_PARTS, asgi.PART_BYTES]),
        ("a stream without a first token", [Settings().first_event_timeout_s]),
        ("tools", [limits.MAX_TOOLS]),
        ("fields that `/v1/responses` echoes", [responses.MAX_ECHOED_BYTES // MIB]),
        ("a grammar as text", [source.MAX_CHARS]),
        ("a JSON schema", [source.MAX_DEPTH, source.MAX_PROPERTIES, source.MAX_REFERENCES]),
        ("a tool's shared definitions", [arguments.MAX_REPEATED]),
        ("images of a request", [Settings().max_images]),
        ("pixels of an image", [Settings().max_image_pixels]),
        ("decoded, those of one request", [Settings().max_image_memory // MIB]),
        ("decoded, those of all requests", [Settings().max_image_memory // MIB]),
        ("answers that are kept", [Settings().max_answer_memory // MIB]),
        ("bytes that a prompt has fetched", [Settings().payload_limit // MIB]),
        ("time for all that a prompt has fetched", [images.FETCH_TIMEOUT_S]),
        ("pixels to which a processor enlarges or pads", [strips.MAX_PIXELS]),
        ("fetched at a time", [images.MAX_FETCHES]),
        ("redirects of a URL", [fetch.MAX_REDIRECTS]),
        ("chunks of the image host's response", [fetch.MAX_SMALL_PARTS]),
        ("characters of a URL", [fetch.MAX_URL_CHARS]),
        ("scans of a JPEG", [headers.MAX_SCANS, headers.MAX_SEGMENTS]),
        ("stored answers of `/v1/responses`", [response_store.MAX_BYTES // MIB, Settings().response_store]),
    ],
)
def test_the_page_has_each_limit_as_it_is(row: str, values: list[float]) -> None:
    [line] = [line for line in TEXT.splitlines() if line.startswith(f"| {row}")]
    for value in values:
        assert f" {int(value):,}" in line


def test_the_page_has_the_figures_of_its_sentences_as_they_are() -> None:
    assert f"at most {delivery._MAX_DELAY_S * 1000:.0f} ms" in TEXT
    assert f"{sequence.AGING_S:.0f} s of waiting" in TEXT
    assert f"except for the first {kv.EAGER_BYTES // MIB} MiB" in " ".join(TEXT.split())
