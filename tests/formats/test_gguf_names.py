"""The choice among a repository's GGUF files, by names as they occur on the Hub."""

from __future__ import annotations

import pytest

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf_names import Part, choose, models_of, projector_of, quant_of, shares_name

# As the repositories of bartowski, unsloth and others name them.
FLAT = ["M-Q3_K_S.gguf", "M-Q4_0.gguf", "M-Q4_0_4_4.gguf", "M-Q4_K_M.gguf", "M-Q8_0.gguf", "M-f16.gguf"]
FOLDERS = [
    "BF16/M-BF16-00001-of-00002.gguf",
    "BF16/M-BF16-00002-of-00002.gguf",
    "Q4_K_M/model-00001-of-00003.gguf",
    "Q4_K_M/model-00002-of-00003.gguf",
    "Q4_K_M/model-00003-of-00003.gguf",
    "M-UD-Q4_K_XL.gguf",
    "mmproj-F16.gguf",
    "M-imatrix.gguf",
    "README.md",
]


def chosen(names: list[str], quant: str | None) -> tuple[str, ...]:
    return choose(models_of(names), quant, "org/repo").files


@pytest.mark.parametrize(
    ("path", "quant"),
    [
        ("llama-2-7b.Q4_K_M.gguf", "Q4_K_M"),
        ("Phi-3-mini-4k-instruct-q4.gguf", "Q4"),
        ("Phi-3-mini-4k-instruct-fp16.gguf", "FP16"),
        ("gemma-3-1b-it-q4_0.gguf", "Q4_0"),
        ("Qwen3-4B-UD-IQ1_S.gguf", "UD-IQ1_S"),
        ("model_q4_k_m.gguf", "Q4_K_M"),
        ("M.i1-Q4_K_S.gguf", "Q4_K_S"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("M-TQ1_0.gguf", "TQ1_0"),
        ("q2_k-model-f16.gguf", "F16"),
        ("Q4_K_M/model-00001-of-00003.gguf", "Q4_K_M"),
        ("Q4_K_M/model-Q5_K_M.gguf", "Q5_K_M"),
        ("qwen3-4b.gguf", ""),
    ],
)
def test_a_quantisation_is_found_in_a_name(path: str, quant: str) -> None:
    assert quant_of(path) == quant


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (FLAT, "M-Q4_K_M.gguf"),
        ([name for name in FLAT if "Q4_K_M" not in name], "M-Q8_0.gguf"),
        (["M-f16.gguf", "M-Q6_K.gguf", "M-Q5_K_S.gguf"], "M-Q5_K_S.gguf"),
        (["only.gguf"], "only.gguf"),
        (FOLDERS, "Q4_K_M/model-00001-of-00003.gguf"),
        (["mmproj-Q8_0.gguf", "M-Q5_0.gguf", "mtp-M-Q4_K_M.gguf"], "M-Q5_0.gguf"),
        # A model with a missing part is not chosen by default.
        (["M-Q4_K_M-00001-of-00002.gguf", "M-Q2_K.gguf"], "M-Q2_K.gguf"),
    ],
)
def test_without_a_word_it_is_what_most_take(names: list[str], expected: str) -> None:
    assert chosen(names, None)[0] == expected
    assert chosen(list(reversed(names)), None)[0] == expected


@pytest.mark.parametrize(
    ("names", "quant", "first", "count"),
    [
        (FLAT, "Q8_0", "M-Q8_0.gguf", 1),
        (FLAT, "q4_k_m", "M-Q4_K_M.gguf", 1),
        (FLAT, "q4_0", "M-Q4_0.gguf", 1),
        (FLAT, "F16", "M-f16.gguf", 1),
        (FLAT, "m-q3_k_s.GGUF", "M-Q3_K_S.gguf", 1),
        (FOLDERS, "bf16", "BF16/M-BF16-00001-of-00002.gguf", 2),
        (FOLDERS, "Q4_K_M", "Q4_K_M/model-00001-of-00003.gguf", 3),
        (FOLDERS, "model-00002-of-00003.gguf", "Q4_K_M/model-00001-of-00003.gguf", 3),
        (FOLDERS, "Q4_K_M/model-00003-of-00003.gguf", "Q4_K_M/model-00001-of-00003.gguf", 3),
        (FOLDERS, "Q4_K_XL", "M-UD-Q4_K_XL.gguf", 1),
        (FOLDERS, "UD-q4_k_xl", "M-UD-Q4_K_XL.gguf", 1),
        (["a-Q4_K_M.gguf", "a-UD-Q4_K_M.gguf"], "Q4_K_M", "a-Q4_K_M.gguf", 1),
        (["v1-Q4_K_M.gguf", "v2-Q4_K_M.gguf"], "v2-Q4_K_M.gguf", "v2-Q4_K_M.gguf", 1),
        (["M-Q4-custom.gguf", "N.gguf"], "n", "N.gguf", 1),
    ],
)
def test_a_model_is_found_by_quantisation_or_file(
    names: list[str], quant: str, first: str, count: int
) -> None:
    files = chosen(names, quant)
    assert (files[0], len(files)) == (first, count)


@pytest.mark.parametrize(
    ("names", "quant", "reason"),
    [
        (FLAT, "Q4_K", "org/repo has no 'Q4_K'; it has Q3_K_S, Q4_0, Q4_0_4_4, Q4_K_M, Q8_0, F16"),
        (FOLDERS, "Q8_0", "org/repo has no 'Q8_0'; it has BF16, UD-Q4_K_XL, Q4_K_M"),
        (FOLDERS, "mmproj-F16.gguf", "has no 'mmproj-F16.gguf'; it has BF16"),
        (["a.gguf", "b.gguf"], "Q4_0", "it has a.gguf, b.gguf"),
        (
            ["v1-Q4_0.gguf", "v2-Q4_0.gguf"],
            "q4_0",
            "several models that 'q4_0' names; name a file: v1-",
        ),
        ([f"m-{index}.gguf" for index in range(50)], "Q4_0", "m-44.gguf and 10 more"),
    ],
)
def test_a_name_that_names_none_or_several_lists_what_there_is(
    names: list[str], quant: str, reason: str
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        chosen(names, quant)
    assert reason in str(caught.value)


def test_parts_are_counted() -> None:
    (model,) = models_of(["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"])
    assert model.num_missing == 1
    # Parts with another count belong to another model.
    assert len(models_of(["m-00001-of-00003.gguf", "m-00001-of-00002.gguf"])) == 2


@pytest.mark.parametrize("name", ["m.gguf", "m-00000-of-00002.gguf", "m-00003-of-00002.gguf", "m-1-of-2"])
def test_other_names_are_of_no_part(name: str) -> None:
    assert Part.of(name) is None


@pytest.mark.parametrize(
    ("model", "others", "expected"),
    [
        ("M-Q4_K_M.gguf", FOLDERS, "mmproj-F16.gguf"),
        ("M-Q4_K_M.gguf", FLAT, None),
        ("M-Q4_K_M.gguf", ["mmproj-M-Q8_0.gguf", "mmproj-M-f16.gguf"], "mmproj-M-f16.gguf"),
        ("M-Q4_K_M.gguf", ["mmproj-F32.gguf", "mmproj-F16.gguf", "mmproj-BF16.gguf"], "mmproj-BF16.gguf"),
        ("M-Q4_K_M.gguf", ["M-mmproj.gguf", "mmproj-model-f16.gguf"], "M-mmproj.gguf"),
        ("M-4B-Q4_0.gguf", ["mmproj-M-12B-BF16.gguf", "mmproj-M-4B-Q8_0.gguf"], "mmproj-M-4B-Q8_0.gguf"),
        ("M-4B-Q4_0.gguf", ["mmproj-A-BF16.gguf", "mmproj-model-F32.gguf"], "mmproj-model-F32.gguf"),
        ("M-4B-Q4_0.gguf", ["mmproj-A-F16.gguf"], None),
        ("llama-2-7b-chat.Q4_K_M.gguf", ["llava-v1.5-7b-mmproj-model-f16.gguf"], None),
        (
            "gemma-3-12b-it-qat-Q4_0.gguf",
            ["mmproj-gemma-3-4b-it-BF16.gguf", "mmproj-gemma-3-12b-it-F16.gguf"],
            "mmproj-gemma-3-12b-it-F16.gguf",
        ),
        (
            "Qwen2.5-VL-7B-Instruct-abliterated.Q4_K_M.gguf",
            [f"mmproj-Qwen2.5-VL-{size}-Instruct-f16.gguf" for size in ("3B", "7B")],
            "mmproj-Qwen2.5-VL-7B-Instruct-f16.gguf",
        ),
        (
            "llava-v1.5-7b-Q4_K.gguf",
            ["bakllava-mmproj-f16.gguf", "llava-v1.5-7b-mmproj-model-f16.gguf"],
            "llava-v1.5-7b-mmproj-model-f16.gguf",
        ),
        (
            "Mistral-Small-3.1-24B-Instruct-2503-Q4_K_M.gguf",
            ["mmproj-mistral-small-24b-f16.gguf", "mmproj-F32.gguf"],
            "mmproj-mistral-small-24b-f16.gguf",
        ),
        (
            "SmolVLM-500M-Instruct-Q8_0.gguf",
            ["mmproj-SmolVLM-500M-Instruct-f16.gguf", "mmproj-SmolVLM-500M-Instruct-Q8_0.gguf"],
            "mmproj-SmolVLM-500M-Instruct-f16.gguf",
        ),
        (
            "google_gemma-3-4b-it-Q4_K_M.gguf",
            ["mmproj-google_gemma-3-4b-it-f16.gguf"],
            "mmproj-google_gemma-3-4b-it-f16.gguf",
        ),
        ("gemma-3-4b-it-q4_0.gguf", ["mmproj-model-f16-4B.gguf"], "mmproj-model-f16-4B.gguf"),
        ("gemma-3-12b-it-q4_0.gguf", ["mmproj-model-f16-4B.gguf"], None),
        ("Qwen2.5-VL-7B.Q4_K_M.gguf", ["Qwen2.5-VL-7B.mmproj-Q8_0.gguf"], "Qwen2.5-VL-7B.mmproj-Q8_0.gguf"),
        ("ggml-model-q4_k.gguf", ["mmproj-model-f16.gguf"], "mmproj-model-f16.gguf"),
        ("Q4_K_M/model-00001-of-00003.gguf", FOLDERS, "mmproj-F16.gguf"),
        ("a/M-Q4_0.gguf", ["mmproj-F16.gguf", "a/mmproj-Q8_0.gguf"], "a/mmproj-Q8_0.gguf"),
        ("a/M-Q4_0.gguf", ["b/mmproj-F16.gguf", "a/b/mmproj-F16.gguf", "mmproj.txt"], None),
    ],
)
def test_a_projector_is_the_nearest_one_of_the_model_s_name(
    model: str, others: list[str], expected: str | None
) -> None:
    assert projector_of(model, [model, *others]) == expected
    assert projector_of(model, [*reversed(others), model]) == expected


def test_a_projector_of_another_model_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert projector_of("m-Q4_0.gguf", ["m-Q4_0.gguf", "mmproj-a-F16.gguf", "mmproj-b-BF16.gguf"]) is None
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("mmproj-b-BF16.gguf is not used for images, as its name is not that of m-Q4_0")
    assert "--mmproj" in message
    caplog.clear()
    assert projector_of("m-Q4_0.gguf", ["mmproj-a-F16.gguf", "mmproj-F16.gguf"]) == "mmproj-F16.gguf"
    assert not caplog.records


@pytest.mark.parametrize(
    ("projector", "expected"),
    [("llava-v1.5-7b-mmproj-f16.gguf", True), ("mmproj-model-f16.gguf", False), ("mmproj-7b.gguf", False)],
)
def test_names_share_words_that_are_no_sizes(projector: str, expected: bool) -> None:
    assert shares_name("llava-v1.5-7b-Q4_K.gguf", projector) == expected
