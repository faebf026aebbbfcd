"""Open a model's files: configuration, weights, tokenizer and chat template, from either format."""

from __future__ import annotations

from pathlib import Path

from tgi_asgi.formats.files import read_json
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.loading import Weights
from tgi_asgi.models.loading.gguf import GgufWeights
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
from tgi_asgi.text.chat.template import ChatTemplate, load_chat_template
from tgi_asgi.text.tokenizer import Tokenizer


class OpenModel:
    """A model's files, opened but not loaded.

        with OpenModel(files) as model:
            tokenizer, chat_template = model.read_text()
            model = Llama(model.config, model.weights, ...)

    Raises:
        ModelLoadError: a file is missing, damaged, or describes what is not supported.
    """

    config: ModelConfig
    weights: Weights

    def __init__(self, files: ModelFiles, *, chat_template_path: str | None = None) -> None:
        self._override = Path(chat_template_path) if chat_template_path else None
        self._directory = files.path if files.kind == "directory" else None
        self._gguf: GgufFile | None = None
        if files.kind == "gguf":
            self._gguf = GgufFile.open(files.path)
            self.config = ModelConfig.from_gguf(self._gguf.metadata, frozenset(self._gguf.tensors))
            self.weights = GgufWeights(self._gguf, self.config)
        else:
            config = read_json(files.path / "config.json")
            self.config = ModelConfig.from_json(config)
            self.weights = SafetensorsWeights(files.path, Quantisation.from_json(config))

    def read_text(self) -> tuple[Tokenizer, ChatTemplate | None]:
        """Build the tokenizer and compile the chat template; may run beside the loading of weights."""
        metadata = None if self._gguf is None else self._gguf.metadata
        if metadata is not None:
            tokenizer = Tokenizer.from_gguf(metadata)
        else:
            assert self._directory is not None
            tokenizer = Tokenizer.from_directory(self._directory)
        template = load_chat_template(
            tokenizer.special_tokens, override=self._override, directory=self._directory, metadata=metadata
        )
        return tokenizer, template

    def close(self) -> None:
        """Unmap the weights."""
        self.weights.close()

    def __enter__(self) -> OpenModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
