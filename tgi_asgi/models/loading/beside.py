"""What a model's files hold besides its configuration and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgi_asgi.models.generation_config import gguf_generation_config, read_generation_config
from tgi_asgi.models.labels import LabelFiles, read_labels
from tgi_asgi.models.pooling import PoolingFiles, read_gguf_pooling, read_pooling
from tgi_asgi.text.chat.template import ChatTemplate, load_chat_template
from tgi_asgi.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class BesideCheckpoint:
    """The other files of a checkpoint's directory; `text_directory` has the tokenizer and the template."""

    directory: Path
    text_directory: Path

    def text(self, override: Path | None) -> tuple[Tokenizer, ChatTemplate | None]:
        """Build the tokenizer and compile the chat template, which `override` may replace."""
        tokenizer = Tokenizer.from_directory(self.text_directory, self.directory)
        special = tokenizer.special_tokens
        for directory in (self.text_directory, self.directory):  # an adapter's tokenizer may have no template
            template = load_chat_template(special, override=override, directory=directory)
            if template is not None:
                return tokenizer, template
        return tokenizer, None

    def pooling(self) -> PoolingFiles:
        """Return the pooling settings."""
        return read_pooling(self.directory)

    def labels(self) -> LabelFiles:
        """Return what is said about a classifier's labels."""
        return read_labels(self.directory)

    def generation_config(self) -> dict[str, Any]:
        """Return what is said about sampling, by the names of generation_config.json."""
        return read_generation_config(self.directory)


@dataclass(frozen=True, slots=True)
class BesideGguf:
    """The metadata of a GGUF file; its methods are those of `BesideCheckpoint`."""

    metadata: Mapping[str, Any]

    def text(self, override: Path | None) -> tuple[Tokenizer, ChatTemplate | None]:
        """Build the tokenizer and compile the chat template, which `override` may replace."""
        tokenizer = Tokenizer.from_gguf(self.metadata)
        special = tokenizer.special_tokens
        return tokenizer, load_chat_template(special, override=override, metadata=self.metadata)

    def pooling(self) -> PoolingFiles:
        """Return the pooling settings."""
        return read_gguf_pooling(self.metadata)

    def labels(self) -> LabelFiles:
        """Return nothing: GGUF files of classifiers are not supported."""
        return LabelFiles()

    def generation_config(self) -> dict[str, Any]:
        """Return what is said about sampling, by the names of generation_config.json."""
        return gguf_generation_config(self.metadata)
