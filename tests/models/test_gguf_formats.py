"""Whole small models in every format of GGUF files, against `transformers` and against llama.cpp's own error.

The reference is `transformers` in float32 on the weights that the file's blocks decode to.
oracle/llama-errors.json holds llama.cpp's errors on the same files, as recorded by
oracle/record_llama_errors.py. The normal run covers every format with Llama and one with Qwen 2; `make
test-models` covers both with all formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.checkpoints import our_logits
from tests.support.family_case import FamilyCase
from tests.support.family_scores import differences, score
from tests.support.gguf_blocks import CONVERTED, FORMATS
from tests.support.gguf_models import LLAMA, QWEN2, MadeModel, format_of, make
from tgi_asgi import ops
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.ops.formats import FORMATS as READ

EXACT = 2e-4  # of a log-probability; correct results are within 1e-4
MARGIN = 1.1  # of llama.cpp's errors
MARGIN_OF_ONE = 1.5  # of its largest, which is noise: llama.cpp's own varies by 1.7 with the cache's type
ERRORS = json.loads(Path(__file__).with_name("oracle").joinpath("llama-errors.json").read_text("utf-8"))
MIXED = {
    "*.0.self_attn.q_proj.*": "Q4_K",
    "*.0.self_attn.k_proj.*": "Q6_K",
    "*.0.self_attn.v_proj.*": "Q8_0",
    "*.0.mlp.gate_proj.*": "Q5_K",
    "*.0.mlp.up_proj.*": "IQ4_XS",
    "*.1.self_attn.q_proj.*": "BF16",  # floats next to codes
    "*.1.self_attn.k_proj.*": "IQ4_NL",
    "*.1.self_attn.v_proj.*": "F16",
    "*.1.mlp.gate_proj.*": "MXFP4",
    "*.1.mlp.up_proj.*": "Q2_K",
    "*.o_proj.*": "Q5_1",
    "*.down_proj.*": "Q3_K",
    "*embed*": "Q4_1",
    "*": "Q6_K",
}

Maker = Callable[[FamilyCase, str], MadeModel]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Return a function that makes a model in a format, once for all tests here."""
    kept: dict[tuple[str, str], MadeModel] = {}

    def get(case: FamilyCase, format: str) -> MadeModel:
        if (case.name, format) not in kept:
            folder = tmp_path_factory.mktemp(f"{case.name}-{format}")
            kept[case.name, format] = make(case, folder, MIXED if format == "mixed" else {"*": format})
        return kept[case.name, format]

    return get


def cases(qwen2: str) -> list[Any]:
    """Return a test's parameters; the normal run covers Qwen 2 in one format only."""
    return [pytest.param(LLAMA, format, id=f"llama-{format}") for format in FORMATS] + [
        pytest.param(QWEN2, format, id=f"qwen2-{format}", marks=() if format == qwen2 else pytest.mark.models)
        for format in FORMATS
    ]


def test_every_format_of_gguf_files_is_held() -> None:
    assert {*FORMATS, "F32"} == {name for name, row in READ.items() if row.ggml_type is not None}


@pytest.mark.parametrize(("case", "format"), cases("Q5_K"))
def test_log_probabilities_are_those_of_transformers(made: Maker, case: FamilyCase, format: str) -> None:
    model = made(case, format)
    job = score(case, model.files, model.reference, "float32")
    assert differences(job, model.reference).max() <= EXACT
    assert model.reference.logprobs.max(1).mean() > -2.5, "flat log-probabilities prove nothing"


@pytest.mark.parametrize("format", CONVERTED)
def test_types_that_are_converted_give_the_log_probabilities_of_transformers(
    made: Maker, format: str
) -> None:
    model = made(LLAMA, format)
    job = score(LLAMA, model.files, model.reference, "float32")
    assert differences(job, model.reference).max() <= EXACT
    assert model.reference.logprobs.max(1).mean() > -2.5, "flat log-probabilities prove nothing"


@pytest.mark.parametrize(("case", "format"), cases("Q4_K"))
def test_default_arithmetic_errs_no_more_than_llama_cpp(made: Maker, case: FamilyCase, format: str) -> None:
    model = made(case, format)
    # llama.cpp does not multiply by Q8_1; its codes are Q8_0's, so Q8_0's error applies.
    theirs = ERRORS["errors"][case.name]["Q8_0" if format == "Q8_1" else format]
    assert format == "Q8_1" or model.digest == theirs["file"], (
        "the file is not the recorded one: run tests/models/oracle/record_llama_errors.py"
    )
    logits = our_logits(model.files, model.reference.all_ids, is_exact=False)
    apart = np.abs(logits.double().log_softmax(-1).numpy() - model.reference.logprobs)
    # float16 products are exact here, so only the cache's rounding matters: it is bfloat16's, three times
    # that of llama.cpp's usual cache.
    allowed = theirs["bfloat16" if format == "F16" else "float16"]
    assert apart.mean() <= MARGIN * allowed["mean"]
    assert np.quantile(apart, 0.99) <= MARGIN * allowed["p99"]
    assert apart.max() <= MARGIN_OF_ONE * allowed["max"]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in (LLAMA, QWEN2)])
def test_matrices_of_one_product_may_differ_in_format(made: Maker, case: FamilyCase) -> None:
    model = made(case, "mixed")
    job = score(case, model.files, model.reference, "float32")
    assert differences(job, model.reference).max() <= EXACT


def test_matrices_of_one_product_keep_their_formats_and_sizes(made: Maker) -> None:
    files = made(LLAMA, "mixed").files
    with OpenModel(files) as opened:
        model: Any = opened.load(ops.Packing(is_exact=False), max_positions=16)
    file = GgufFile.open(files.path)
    try:
        sizes = {name: file.tensor(name).nbytes for name in file.names}
    finally:
        file.close()
    for index, layer in enumerate(model.layers):
        parts = [*layer.qkv.made.parts, layer.output.made, *layer.up.made.parts, layer.down.made]
        names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
        canonical = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        for part, name, matrix in zip(parts, names, canonical, strict=True):
            where = "mlp" if matrix in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            assert part.matrix.format == format_of(MIXED, f"model.layers.{index}.{where}.{matrix}.weight")
            # Scales of k-quants are unpacked to whole bytes, which adds at most four bytes to Q3_K's 110.
            assert part.matrix.nbytes <= 1.04 * sizes[f"blk.{index}.{name}.weight"], name
