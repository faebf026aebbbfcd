"""Loading: what is reported, the resulting limits, and what is refused."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self

import pytest

from tests.cuda.emulated_device import EmulatedDevice
from tests.support.checkpoints import make_model, save, save_tokenizer
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.runner import load as load_module
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.settings import Settings


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    directory = tmp_path_factory.mktemp("model")
    model = save(make_model(), directory)
    save_tokenizer(directory)
    return model


def load_closed(files: ModelFiles, settings: Settings) -> LoadedModel:
    loaded = load(settings, files)
    loaded.runner.close()
    return loaded


def settings(**changes: object) -> Settings:
    return Settings(**{"thread_nice": 0, "max_batch_size": 4, "num_threads": 1, **changes})  # type: ignore[arg-type]


def test_what_was_loaded_is_told(files: ModelFiles) -> None:
    info = load_closed(files, settings(dtype="float32")).info
    assert (info.model_id, info.architecture, info.dtype) == ("tiny", "LlamaForCausalLM", "float32")
    assert (info.vocab_size, info.max_total_tokens, info.max_input_tokens) == (160, 512, 511)
    assert info.kv_tokens == 4 * 512
    assert info.kv_bytes == info.kv_tokens * 2 * 3 * 2 * 16 * 4
    assert info.num_threads == 1


def test_the_runner_says_how_much_of_the_cache_is_committed(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi_asgi.runner.kv.EAGER_BYTES", 10 * 16 * 2 * 3 * 2 * 16 * 4)
    assert load_closed(files, settings(dtype="float32")).runner.traits.num_eager_blocks == 10


def test_there_are_no_more_threads_than_processors(
    files: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    num_usable = len(os.sched_getaffinity(0))
    with caplog.at_level("WARNING"):
        assert load_closed(files, settings(num_threads=1000)).info.num_threads == num_usable
    assert f"--num-threads 1000 is cut to {num_usable}" in caplog.text


def test_progress_counts_bytes_up_to_all_of_them(files: ModelFiles) -> None:
    calls: list[tuple[str, int, int | None]] = []
    load(settings(), files, lambda *call: calls.append(call)).runner.close()
    done = [call[1] for call in calls if call[0] == "loading weights"]
    total = calls[-1][2]
    assert done == sorted(done)
    assert total == done[-1] > 0


def test_the_administrator_s_limits_bound_a_sequence(files: ModelFiles) -> None:
    info = load_closed(files, settings(max_total_tokens=100, max_input_tokens=60)).info
    assert (info.max_total_tokens, info.max_input_tokens) == (100, 60)


def test_limits_beyond_the_model_s_are_cut_and_logged(
    files: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        info = load_closed(files, settings(max_total_tokens=4096, max_input_tokens=600)).info
    assert (info.max_total_tokens, info.max_input_tokens) == (512, 511)
    total, prompt = (message for message in caplog.messages if "is cut to" in message)
    assert total.startswith("--max-total-tokens 4096 is cut to the model's context of 512 tokens")
    assert prompt.startswith("--max-input-tokens 600 is cut to 511")


def test_a_small_cache_bounds_a_sequence(files: ModelFiles) -> None:
    loaded = load_closed(files, settings(max_batch_total_tokens=128))
    runner = loaded.runner
    assert (loaded.info.max_total_tokens, runner.max_context, runner.traits.num_blocks) == (128, 128, 8)


def test_the_cache_may_be_as_long_as_the_longest_sequence(files: ModelFiles) -> None:
    """TGI's own condition, of numbers that are no multiples of a block's size."""
    loaded = load_closed(files, settings(max_batch_total_tokens=100, max_total_tokens=100))
    assert (loaded.info.max_total_tokens, loaded.runner.traits.num_blocks) == (100, 7)


def test_buffers_that_the_system_refuses_are_named_with_their_options(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*shape: object, **form: object) -> None:
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(ops, "SampleState", refuse)
    with pytest.raises(ModelLoadError, match="4 sequences and 4096 prompt tokens: set --max-batch-size or"):
        load_closed(files, settings())


def test_the_fingerprint_names_weights_and_arithmetic(files: ModelFiles, tmp_path: Path) -> None:
    first, again = (load_closed(files, settings()).info.fingerprint for _ in range(2))
    other_dtype = load_closed(files, settings(dtype="float32")).info.fingerprint
    assert first == again != other_dtype
    changed = make_model()
    changed.model.norm.weight.data[0] += 1
    save(changed, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((files.path / "tokenizer.json").read_bytes())
    other = ModelFiles("other", None, "directory", tmp_path)
    assert load_closed(other, settings()).info.fingerprint != first


def test_quantize_is_not_ignored_without_a_word(files: ModelFiles, caplog: pytest.LogCaptureFixture) -> None:
    load_closed(files, settings(quantize="q8_0"))
    assert not caplog.text
    load_closed(files, settings(quantize="eetq"))
    assert "--quantize eetq is ignored: only q8_0 and q4_0 are known" in caplog.text


def test_kernels_that_the_system_refused_are_said(
    files: ModelFiles, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "amx: the system refused its tiles (arch_prctl)"
    refused = ops.KernelSet("avx512_vnni", "fma", reason)
    monkeypatch.setattr(ops, "kernel_set", lambda: refused)
    info = load_closed(files, settings()).info
    assert f"{reason}; avx512_vnni kernels serve" in caplog.text
    assert info.kernel_set == "avx512_vnni"


def test_prompts_in_bfloat16_are_told_and_have_a_fingerprint(
    files: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    plain = load_closed(files, settings(quantize="q8_0", prompt_precision="int8"))
    assert plain.info.prompt_precision is None and not plain.runner.traits.has_prompt_arithmetic
    caplog.set_level(logging.INFO)
    found = load_closed(files, settings(quantize="q8_0", prompt_precision="bfloat16"))
    assert found.info.prompt_precision == "bfloat16" and found.runner.traits.has_prompt_arithmetic
    assert found.info.fingerprint != plain.info.fingerprint
    assert "a product of Q8_0 takes" in caplog.text


@pytest.mark.parametrize(("arithmetic", "expected"), [("tdpbf16ps", "bfloat16"), ("vdpbf16ps", None)])
def test_prompts_are_in_bfloat16_where_there_are_tiles(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch, arithmetic: str, expected: str | None
) -> None:
    monkeypatch.setattr(ops, "kernel_set", lambda: ops.KernelSet("some", arithmetic, None))
    assert load_closed(files, settings(quantize="q8_0")).info.prompt_precision == expected
    in_int8 = load_closed(files, settings(quantize="q8_0", prompt_precision="int8"))
    assert in_int8.info.prompt_precision is None
    generic = load_closed(files, settings(model_impl="transformers"))
    assert generic.info.prompt_precision is None


@pytest.mark.parametrize("changes", [{}, {"dtype": "float32", "quantize": "q8_0"}])
def test_prompts_in_bfloat16_change_nothing_of_floats(
    files: ModelFiles, changes: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    plain = load_closed(files, settings(**changes))
    caplog.set_level(logging.INFO)
    found = load_closed(files, settings(**changes, prompt_precision="bfloat16"))
    assert "--prompt-precision bfloat16 changes nothing" in caplog.text
    assert found.info.prompt_precision is None and not found.runner.traits.has_prompt_arithmetic
    assert found.info.fingerprint == plain.info.fingerprint


@pytest.mark.parametrize(
    ("arithmetic", "changes", "is_named"),
    [
        ("vdpbf16ps", {}, True),
        ("vdpbf16ps", {"model_impl": "transformers"}, True),
        ("fma", {}, False),
        ("vdpbf16ps", {"dtype": "float32"}, False),
        ("vdpbf16ps", {"dtype": "bfloat16"}, False),
        ("vdpbf16ps", {"quantize": "q8_0"}, False),
    ],
)
def test_a_faster_dtype_is_named_for_weights_in_float32(
    arithmetic: str, changes: dict[str, str], is_named: bool,
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(ops, "kernel_set", lambda: ops.KernelSet("some", arithmetic, None))
    caplog.set_level(logging.INFO)
    load_closed(files, settings(**changes))
    named = "products with weights in float32 are computed in float32; --dtype bfloat16 rounds"
    assert (named in caplog.text) == is_named


def test_prompts_in_bfloat16_are_refused_of_models_by_transformers_code(files: ModelFiles) -> None:
    with pytest.raises(ModelLoadError, match="LlamaForCausalLM is computed by transformers' code"):
        load_closed(files, settings(model_impl="transformers", prompt_precision="bfloat16"))


def test_prompts_in_bfloat16_are_refused_on_a_gpu(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", EmulatedDevice)
    with pytest.raises(ModelLoadError, match="is for CPUs"):
        load_closed(files, settings(prompt_precision="bfloat16"))


def test_float16_is_refused_with_a_cure(files: ModelFiles) -> None:
    with pytest.raises(ModelLoadError, match="bfloat16 or float32"):
        load_closed(files, settings(dtype="float16"))


def test_what_is_wrong_with_texts_and_settings_is_found_out_before_the_weights_are_read(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    monkeypatch.setattr(load_module, "ThreadPoolExecutor", _AtOnce)
    monkeypatch.setattr(mmap, "mmap", _SmallMmap)
    template = settings(tokenizer_config_path="/nowhere/template.jinja")
    for given, model, message in (
        (template, files, "chat template"),
        (settings(), save(make_model(), tmp_path), r"no such file: .*tokenizer\.json"),
        (settings(score_tokens="no such token"), files, "--score-tokens no such token"),
        (settings(max_batch_total_tokens=1 << 24), files, "set --max-batch-total-tokens to less"),
    ):
        with pytest.raises(ModelLoadError, match=message):
            load(given, model, lambda stage, at, total: done.append(at))
        assert done == []


class _SmallMmap(mmap.mmap):
    """Maps at most 1 GiB, as on a small machine."""

    def __new__(cls, file: int, length: int, *given: Any, **named: Any) -> Self:
        if length > 1 << 30:
            raise OSError(errno.ENOMEM, "no memory")
        return super().__new__(cls, file, length, *given, **named)


class _AtOnce(ThreadPoolExecutor):
    """A thread whose calls have ended when `submit` returns."""

    def submit(self, call: Any, /, *given: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = super().submit(call, *given, **named)
        wait([future])
        return future


def test_a_failed_load_leaves_no_thread(files: ModelFiles) -> None:
    before = threading.active_count()
    with pytest.raises(ModelLoadError):
        load_closed(files, settings(max_total_tokens=512, max_batch_total_tokens=64))
    assert threading.active_count() == before


def test_weights_are_unmapped_once_loaded(files: ModelFiles) -> None:
    loaded = load_closed(files, settings())
    assert str(files.path) not in Path("/proc/self/maps").read_text()
    assert loaded.runner.traits.num_blocks > 0, "the model must still be in use"
