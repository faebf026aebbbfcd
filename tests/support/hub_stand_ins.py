"""Tiny random models in a Hub cache in place of those that documents name, so that commands run verbatim."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.support import adapters, encoders, pooling_models, vision_models
from tests.support.checkpoints import make_model, save, save_tokenizer

_COMMIT = "0" * 40
_CHAT = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def _decoder(folder: Path) -> None:
    save(make_model(), folder)
    save_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": _CHAT}), encoding="utf-8")


def _embedder(folder: Path) -> None:
    pooling_models.save_embedder(folder)


def _reranker(folder: Path) -> None:
    """Make a decoder whose vocabulary contains the words whose logits rank documents."""
    _decoder(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    for word, replaced in zip(("no", "yes"), list(vocabulary)[-2:], strict=True):
        vocabulary[word] = vocabulary.pop(replaced)
    tokenizer["added_tokens"] = [
        {"id": vocabulary[word], "content": word, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": False}
        for word in ("no", "yes")
    ]  # fmt: skip
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def _cross_encoder(folder: Path) -> None:
    encoders.save_encoder(folder, "XLMRoberta", "ForSequenceClassification", mode=None, num_labels=1)


def _classifier(folder: Path) -> None:
    encoders.save_encoder(folder, "Roberta", "ForSequenceClassification", mode=None, num_labels=3)


def _vision(folder: Path) -> None:
    vision_models.make("smolvlm", folder)


_MODELS: dict[str, Callable[[Path], None]] = {
    "Qwen/Qwen3-0.6B": _decoder,
    "Qwen/Qwen3-Embedding-0.6B": _embedder,
    "Qwen/Qwen3-Reranker-0.6B": _reranker,
    "BAAI/bge-reranker-v2-m3": _cross_encoder,
    "cardiffnlp/twitter-roberta-base-sentiment-latest": _classifier,
    "HuggingFaceTB/SmolVLM-256M-Instruct": _vision,
}
_ADAPTERS = ("Qwen/Qwen3-0.6B", ("org/support", "org/sql"))  # the base, and its adapters


class StandIns:
    """Make each model that a command names, once.

    Attributes:
        environ: Variables that make a server use only this cache of the Hub.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environ = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def make_for(self, command: str) -> None:
        """Make the models and adapters whose ids occur in a command."""
        for name, make in _MODELS.items():
            if name in command:
                self._make(name, make)
        base, names = _ADAPTERS
        for name in names:
            if name in command:
                self._make(base, _MODELS[base])
                self._make(name, partial(_adapter, self._snapshot(base)))

    def _snapshot(self, name: str) -> Path:
        return self.home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / _COMMIT

    def _make(self, name: str, make: Callable[[Path], None]) -> None:
        folder = self._snapshot(name)
        if folder.exists():
            return
        folder.mkdir(parents=True)
        make(folder)
        references = folder.parents[1] / "refs"
        references.mkdir()
        for branch in ("main", "v2"):
            (references / branch).write_text(_COMMIT, encoding="utf-8")


def _adapter(base: Path, folder: Path) -> None:
    adapters.make_adapter(base, folder, seed=len(folder.as_posix()))
