"""The tokenizer folder that benchmarks load: it yields the same ids and prompts as the server."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from bench.export_tokenizer import export
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.text.tokenizer import Tokenizer

TEXTS = ["Hello world", " a  b\n\n\tc", "é🦙 漢字", "<|im_start|>user", "it's 12345.67!", ""]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]


def test_transformers_counts_as_the_server_does(tmp_path: Path, demo_gguf: Path) -> None:
    export(str(demo_gguf), tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    file = GgufFile.open(demo_gguf)
    ours = Tokenizer.from_gguf(file.metadata)
    template = ChatTemplate(file.metadata["tokenizer.chat_template"], ours.special_tokens)
    file.close()
    for text in TEXTS:
        assert exported(text).input_ids == ours.encode(text, add_special_tokens=True)
        assert exported.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False)
    assert exported.eos_token_id == ours.eos_id
    assert exported.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    ) == template.render(MESSAGES)


def test_a_checkpoint_s_files_are_copied(tmp_path: Path, demo_gguf: Path) -> None:
    export(str(demo_gguf), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "model" / "model.safetensors").touch()
    export(str(tmp_path / "model"), tmp_path / "copy")
    names = sorted(file.name for file in (tmp_path / "copy").iterdir())
    assert names == ["config.json", "tokenizer.json", "tokenizer_config.json"]
