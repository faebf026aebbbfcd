"""A model's other files, beside configuration and weights: tokenizer, template, pooling, labels, sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.generation_config import gguf_generation_config, read_generation_config
from tgi_asgi.models.labels import LabelFiles, read_labels
from tgi_asgi.models.pooling import PoolingFiles, read_gguf_pooling, read_pooling
from tgi_asgi.text.chat.template import ChatTemplate, load_chat_template
from tgi_asgi.text.older_files import VOCABULARIES
from tgi_asgi.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class CheckpointCompanions:
    """The other files of a checkpoint's directory, or of an adapter's that is merged, if it has its own."""

    directory: Path
    adapter: Path | None = None

    def text(self, override: Path | None) -> tuple[Tokenizer, ChatTemplate | None]:
        """Build the tokenizer and compile the chat template, which `override` may replace."""
        tokenizer = Tokenizer.from_directory(self._own(*VOCABULARIES), self.directory)
        special, template = tokenizer.special_tokens, None
        if self.adapter is not None:
            template = load_chat_template(special, override=override, directory=self.adapter)
        template = template or load_chat_template(special, override=override, directory=self.directory)
        return tokenizer, template

    def pooling(self) -> PoolingFiles:
        """Return the pooling settings."""
        return read_pooling(self._own("modules.json"))

    def labels(self) -> LabelFiles:
        """Return what is said about a classifier's labels."""
        return read_labels(self.directory)

    def generation_config(self) -> dict[str, Any]:
        """Return what is said about sampling, by the names of generation_config.json."""
        return read_generation_config(self.directory)

    def _own(self, *names: str) -> Path:
        """Return the adapter's directory if it has one of these files, otherwise the checkpoint's."""
        has_own = self.adapter is not None and any((self.adapter / name).is_file() for name in names)
        return self.adapter if self.adapter is not None and has_own else self.directory


@dataclass(frozen=True, slots=True)
class GgufCompanions:
    """What a GGUF file has besides weights; its methods are those of `CheckpointCompanions`."""

    file: GgufFile
    tokens: Mapping[str, str] = field(default_factory=dict)  # that stand for images, by their names

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.file.metadata

    def text(self, override: Path | None) -> tuple[Tokenizer, ChatTemplate | None]:
        """Build the tokenizer and compile the chat template, which `override` may replace."""
        tokenizer = Tokenizer.from_gguf(self.metadata, self.tokens)
        special = tokenizer.special_tokens
        return tokenizer, load_chat_template(special, override=override, metadata=self.metadata)

    def pooling(self) -> PoolingFiles:
        """Return the pooling settings."""
        return read_gguf_pooling(self.file)

    def labels(self) -> LabelFiles:
        """Return the names of a classifier's labels."""
        names = self.metadata.get(f"{self.metadata.get('general.architecture')}.classifier.output_labels", ())
        texts = names if isinstance(names, Sequence) and not isinstance(names, str) else ()
        return LabelFiles({str(at): name for at, name in enumerate(texts) if isinstance(name, str)})

    def generation_config(self) -> dict[str, Any]:
        """Return what is said about sampling, by the names of generation_config.json."""
        return gguf_generation_config(self.metadata)
