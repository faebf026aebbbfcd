"""The loaded model, with everything needed to serve it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from tgi_asgi.api.prompt_images import Images
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.types import Adapters, Engine, ImageProcessor

if TYPE_CHECKING:  # these import libraries that are not needed before the model has loaded
    from tgi_asgi.engine.stats import EngineStats
    from tgi_asgi.text.chat.template import ChatTemplate
    from tgi_asgi.text.constrain.compiler import GrammarCompiler
    from tgi_asgi.text.fill import Fill
    from tgi_asgi.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Served:
    """A loaded model with everything needed to serve it."""

    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    info: ModelInfo
    stats: EngineStats | None = None  # the engine's counters, for `/metrics`
    image_processor: ImageProcessor | None = None  # if the model accepts images
    adapters: Adapters | None = None  # if adapters are served

    @property
    def accepts_images(self) -> bool:
        """Whether prompts may have images."""
        return self.image_processor is not None

    def new_images(self) -> Images | None:
        """Return a collector for a prompt's images if the model accepts images, else None."""
        return Images() if self.accepts_images else None

    def serves(self, name: str) -> bool:
        """Return whether this is the model's name or an adapter's."""
        return name == self.info.model_id or (self.adapters is not None and name in self.adapters)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The model's special tokens, by text."""
        return {self.tokenizer.token_text(i): i for i in sorted(self.tokenizer.special_ids)}

    @cached_property
    def fill(self) -> Fill | None:
        """How the model is asked for text between two others; None if its vocabulary has no marks."""
        from tgi_asgi.text.fill import fill_of

        return fill_of(self.tokenizer)

    @cached_property
    def for_scores(self) -> Served:
        """The same model with the chat template for the pairs that it scores."""
        from tgi_asgi.text.chat.template import ChatTemplate

        source = self.info.scoring.template if self.info.scoring is not None else None
        if source is None:
            return self
        return replace(self, chat_template=ChatTemplate(source, self.tokenizer.special_tokens))

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Grammar compiler for the model's vocabulary, created for the first grammar."""
        from tgi_asgi.text.constrain.compiler import GrammarCompiler

        return GrammarCompiler(self.tokenizer, self.info.vocab_size)
