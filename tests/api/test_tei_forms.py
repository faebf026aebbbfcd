"""Routes where TEI's form depends on the model or the body: `/tokenize`; and the types of its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.api.test_tokenize import post
from tests.support.pooling_models import save_embedder
from tests.support.pooling_server import pooled_server
from tests.support.toy_tokenizer import BOS, ToyTokenizer
from tgi_asgi.api.tei.request import TEI
from tgi_asgi.errors import (
    GenerationFailed,
    InvalidRequest,
    ModelLoadError,
    ModelNotSupported,
    Overloaded,
    TooManyPrompts,
    Unavailable,
)


async def test_several_inputs_give_teis_arrays() -> None:
    answer = await post("/tokenize", {"inputs": ["a é", "b"]}, adds_bos=True)
    first, second = answer.json()
    added = {"id": BOS, "text": ToyTokenizer().piece(BOS), "special": True, "start": None, "stop": None}
    assert second == [added, {"id": 98, "text": "b", "special": False, "start": 0, "stop": 1}]
    assert first[0] == added and [token["id"] for token in first[1:]] == list("a é".encode())
    bare = await post("/tokenize", {"inputs": ["b"], "add_special_tokens": False}, adds_bos=True)
    assert bare.json() == [second[1:]]


@pytest.mark.parametrize("inputs", [[], [5], ["a"] * 2049])
async def test_several_inputs_are_checked(inputs: list[Any]) -> None:
    answer = await post("/tokenize", {"inputs": inputs})
    assert answer.status_code in (413, 422) and answer.json()["error_type"] == "Validation"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("a"), "Validation"), (TooManyPrompts("a"), "Validation"),
        (ModelNotSupported("a"), "Backend"), (GenerationFailed("a"), "Backend"), (ValueError("a"), "Backend"),
        (Overloaded("a"), "Overloaded"), (Unavailable("a"), "Unhealthy"), (ModelLoadError("a"), "Unhealthy"),
    ],
)  # fmt: skip
def test_teis_errors_have_its_types(error: Exception, kind: str) -> None:
    assert TEI.envelope(error)["error_type"] == kind


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/embed", {"inputs": "a"}),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}),
        ("/predict", {"inputs": "a"}),
        ("/rerank", {"query": "a", "texts": ["b"]}),
    ],
)
async def test_what_the_model_cannot_do_fails_as_in_tei(route: str, body: dict[str, Any]) -> None:
    answer = await post(route, body)
    assert (answer.status_code, answer.json()["error_type"]) == (424, "Backend")


async def test_a_model_that_only_embeds_tokenises_as_tei_does(tmp_path: Path) -> None:
    save_embedder(tmp_path, "mean")
    async with pooled_server(tmp_path) as server:
        [tokens] = (await server.post("/tokenize", inputs="a b")).json()
        assert {"id", "text", "special", "start", "stop"} == set(tokens[0])
        refused = await server.post("/tokenize", inputs=5)
        assert (refused.status_code, refused.json()["error_type"]) == (422, "Validation")
