"""Every family as a whole: small models against `transformers`, from its files and from llama.cpp's.

The normal run covers a selection; `make test-models` runs all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.support.families import CASES
from tests.support.family_case import FamilyCase, Fault
from tests.support.family_channels import CHANNEL_CASES
from tests.support.family_experts import EXPERT_CASES
from tests.support.family_files import Reference, checkpoint, faulty_checkpoint, gguf_file, reference
from tests.support.family_gemma4 import GEMMA4_CASES
from tests.support.family_latent import LATENT_CASES
from tests.support.family_parts import PART_CASES
from tests.support.family_scores import differences, score
from tests.support.family_states import STATE_CASES
from tgi_asgi.formats.sources import ModelFiles

EXACT = 5e-5  # of a log-probability; correct results are within 7e-6
# For models that `transformers` sums in another order: it computes a delta net in chunks.
EXACT_OTHERWISE = 3e-4  # correct results are within 1.5e-4
FLOATS = ("safetensors", "f32", "f16", "bf16")  # forms whose weights are multiplied as floats
# The largest and the mean difference in default arithmetic. Floats differ by 0.035 and 0.02; codes differ by
# more, because their activations are int8. Some models differ by more, but not by more than `transformers` in
# bfloat16, or twice that for codes.
LOOSE_FLOATS, LOOSE_FLOATS_MEAN = 0.05, 0.03
LOOSE_CODES, LOOSE_CODES_MEAN = 0.3, 0.08
SLACK, SLACK_OF_CODES = 1.2, 2.0
# Codes differ by more if rounded values are multiplied with each other, as in the gates of short
# convolutions and of Gemma 4's layers, and if the weights are rounded, too.
MORE = 2.0
FAULTY = 1e-2  # least effect of a planted fault, well above any tolerance

STORED = {f"{case.name}-{form}": (case, form) for case in CASES for form in ("safetensors", *case.gguf)}
CLOSE = STORED | {f"{case.name}-{form}": (case, form) for case in CASES for form in case.rounded}
ROUTED = (
    *EXPERT_CASES,
    *(
        case
        for case in (*LATENT_CASES, *STATE_CASES, *PART_CASES, *CHANNEL_CASES)
        if "num_experts_per_tok" in case.config
    ),
)
GGUF_FORMS = {form for case in CASES for form in (*case.gguf, *case.rounded)}
FAULTS = {f"{case.name}-{fault.name}": (case, fault) for case in CASES for fault in case.faults}


def rows(all_rows: Mapping[str, tuple[Any, ...]], *, usual: str) -> list[Any]:
    """Return a test's parameters, with those outside `usual` marked `models`."""
    names = usual.split()
    assert set(names) <= all_rows.keys(), names
    found = []
    for name, row in all_rows.items():
        marks = [] if name in names else [pytest.mark.models]
        if isinstance(row[1], str) and row[1] in GGUF_FORMS:
            marks.append(pytest.mark.demo)  # llama.cpp's converter is fetched
        found.append(pytest.param(*row, id=name, marks=marks))
    return found


def open_files(case: FamilyCase, form: str) -> ModelFiles:
    return checkpoint(case) if form == "safetensors" else gguf_file(case, form)


@pytest.mark.parametrize(
    ("case", "form"),
    rows(
        STORED,
        usual="""
            llama-biases-safetensors llama-rope-yarn-safetensors llama-head-24-safetensors
            mistral-window-safetensors qwen2-unused-window-safetensors granite-safetensors
            smollm3-other-layers-safetensors phi3-old-config-safetensors olmo2-safetensors
            lfm2-safetensors qwen3_next-safetensors falcon_h1-safetensors llama-rope-llama3-f32
            llama-own-head-safetensors glm4_moe_lite-layers-safetensors
            llama-odd-sizes-f16 qwen3-q8_0 granite-bf16 phi3-short-factors-f32
        """,
    ),
)
def test_log_probabilities_are_those_of_transformers(case: FamilyCase, form: str) -> None:
    found = reference(case)
    job = score(case, open_files(case, form), found, "float32")
    sums_otherwise = "linear_num_value_heads" in case.config
    assert differences(job, found).max() <= (EXACT_OTHERWISE if sums_otherwise else EXACT)
    assert job.token_ids == found.token_ids


@pytest.mark.parametrize(
    ("case", "form"), rows(CLOSE, usual="llama-q8_0 phi3-partial-rotary-safetensors olmo2-safetensors")
)
def test_default_arithmetic_stays_close(case: FamilyCase, form: str) -> None:
    found = reference(case)
    apart = differences(score(case, open_files(case, form), found, "auto"), found)
    is_float = form in FLOATS
    largest, mean = _largest_and_mean(case, apart)
    assert found.rounding is not None
    usual_largest, usual_mean = _largest_and_mean(case, found.rounding)
    has_products = case in (*STATE_CASES, *GEMMA4_CASES, *PART_CASES, *CHANNEL_CASES)
    codes = MORE if has_products or form in case.rounded else 1.0
    slack = SLACK if is_float else SLACK_OF_CODES
    assert largest <= max(LOOSE_FLOATS if is_float else LOOSE_CODES * codes, usual_largest * slack)
    assert mean <= max(LOOSE_FLOATS_MEAN if is_float else LOOSE_CODES_MEAN * codes, usual_mean * slack)


def _largest_and_mean(case: FamilyCase, apart: np.ndarray) -> tuple[float, float]:
    if case in ROUTED:  # near ties between experts may be decided differently
        return float(np.quantile(apart, 0.9)), float(np.median(apart))
    return float(apart.max()), float(apart.mean())


@pytest.mark.parametrize(
    ("case", "fault"),
    rows(
        FAULTS,
        usual="granite-residual_multiplier mistral-window-no-window phi3-order-of-qkv lfm2-order-of-gates",
    ),
)
def test_a_model_with_a_fault_differs(case: FamilyCase, fault: Fault) -> None:
    found = reference(case)
    job = score(case, faulty_checkpoint(case, fault), found, "float32")
    assert differences(job, found).max() > FAULTY


def test_every_family_has_three_faults() -> None:
    for architecture in {case.architecture for case in CASES}:
        faults = {fault.name for case in CASES if case.architecture == architecture for fault in case.faults}
        assert len(faults) >= 3, architecture


def test_nan_is_no_log_probability() -> None:
    case = CASES[0]
    found = reference(case)
    spoilt = Reference(found.prompt_ids, found.token_ids, found.logprobs * float("nan"))
    job = score(case, checkpoint(case), found, "float32")
    assert differences(job, spoilt).min() == float("inf")
