"""Write a model's tokenizer as a folder that transformers loads offline, as other projects' benchmarks need.

    python -m bench.export_tokenizer directory                       # of the demonstration model
    python -m bench.export_tokenizer directory --model-id model.gguf

tokenizer.json has the tokens and the tokens added around a text; tokenizer_config.json has the special tokens
and the chat template. `AutoTokenizer.from_pretrained(directory)` then counts tokens as the server does.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.sources import resolve
from tgi_asgi.settings import DEMO_MODEL, Settings
from tgi_asgi.text.tokenizer import Tokenizer

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "config.json",
)  # fmt: skip


def write_tokenizer(tokenizer: Tokenizer, chat_template: str | None, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory / "tokenizer.json")
    config = {
        **tokenizer.special_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
    text = json.dumps(config, indent=1, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def export(model_id: str, directory: Path) -> None:
    """Write the tokenizer of a GGUF model, or copy the files of a checkpoint."""
    files = resolve(Settings(model_id=model_id))
    if files.kind != "gguf":
        directory.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (files.path / name).exists():
                shutil.copyfile(files.path / name, directory / name)
        return
    file = GgufFile.open(files.path)
    try:
        template = file.metadata.get("tokenizer.chat_template")
        write_tokenizer(Tokenizer.from_gguf(file.metadata), template, directory)
    finally:
        file.close()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model-id", default=DEMO_MODEL)
    options = parser.parse_args()
    export(options.model_id, options.directory)


if __name__ == "__main__":
    main()
