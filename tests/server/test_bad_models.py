"""Models that cannot be served: one clear line, exit code 1, no traceback."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.server_process import ServerProcess
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import resolve
from tgi_asgi.runner.load import load
from tgi_asgi.settings import Settings

Make = Callable[[Path], Path]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def _silent(stage: str, done: int, total: int | None) -> None:
    pass


def _directory(path: Path, config: object = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def _safetensors(path: Path, header: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def _absent(path: Path) -> Path:
    return path / "absent.gguf"


def _truncated_gguf(path: Path) -> Path:
    file = path / "truncated.gguf"
    file.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 10, 10))
    return file


def _not_a_gguf(path: Path) -> Path:
    file = path / "text.gguf"
    file.write_text("this is a text file, not a model")
    return file


def _lying_offsets(path: Path) -> Path:
    directory = _directory(path / "model")
    tensor = {"dtype": "F32", "shape": [16, 16], "data_offsets": [0, 1 << 40]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    _safetensors(directory / "model.safetensors", header)
    return directory


def _no_weights(path: Path) -> Path:
    return _directory(path / "model")


def _unknown_architecture(path: Path) -> Path:
    directory = _directory(path / "model", CONFIG | {"architectures": ["NovelForCausalLM"]})
    _safetensors(directory / "model.safetensors", b"{}")
    return directory


def _empty_directory(path: Path) -> Path:
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_absent, "absent.gguf"),
        (_truncated_gguf, "truncated.gguf"),
        (_no_weights, "safetensors"),
        (_unknown_architecture, "NovelForCausalLM"),
        (_empty_directory, "config.json"),
    ],
)
def test_a_model_that_cannot_be_served_is_one_clear_line(make: Make, message: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with ServerProcess("tgi_asgi", "--model-id", str(path)) as server:
        assert server.wait() == 1
        assert "Traceback" not in server.output()
        last = server.output().splitlines()[-1]
    assert last.startswith("tgi-asgi: ")
    assert message in last


@pytest.mark.parametrize(
    ("make", "message"), [(_not_a_gguf, "text.gguf"), (_lying_offsets, "model.safetensors")]
)
def test_a_file_that_is_no_model_is_named(make: Make, message: str, tmp_path: Path) -> None:
    settings = Settings(model_id=str(make(tmp_path)))
    with pytest.raises(ModelLoadError, match=message):
        load(settings, resolve(settings, _silent), _silent)


def test_an_arithmetic_that_a_cpu_does_not_do_is_one_clear_line(demo_gguf: Path) -> None:
    with ServerProcess("tgi_asgi", "--dtype", "float16") as server:  # `demo_gguf` has fetched the model
        assert server.wait() == 1
        assert "--dtype" in server.output().splitlines()[-1]
