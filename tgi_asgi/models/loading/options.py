"""How the administrator wants a model to be computed, and what a native family reads then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tgi_asgi.errors import NotInFamily, check
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.family import Family
from tgi_asgi.models.loading.recognise import architecture_of, is_native, read_config
from tgi_asgi.models.registry import has_family
from tgi_asgi.models.rope import scale_positions, stretch_context
from tgi_asgi.settings import GivenRope


@dataclass(frozen=True, slots=True)
class NotNative:
    """No native family computes the model, or none is to.

    Attributes:
        why: Why the architecture's family does not compute it; empty if the architecture has none.
    """

    why: str = ""


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """The choices of an administrator.

    Attributes:
        model_impl: native, transformers or auto.
        rope: RoPE scaling that overrides the files'.
    """

    model_impl: str = "native"
    trusts_code: bool = False
    rope: GivenRope | None = None

    def scaled(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration with the given RoPE scaling."""
        return config if self.rope is None else scale_positions(config, self.rope)

    def stretched(self, config: ModelConfig) -> ModelConfig:
        """Return a checkpoint's configuration with the context to which its rotary embedding stretches it."""
        return stretch_context(config) if self.rope is None else self.scaled(config)

    def read_native(self, config: Mapping[str, Any]) -> tuple[Family, ModelConfig] | NotNative:
        """Return the native family that computes the model of a config.json, and what it reads there.

        Raises:
            ModelLoadError: if only a native family may compute it, and none does.
        """
        if self.model_impl == "native":
            name = architecture_of(config)
            check(
                not config.get("vision_config") or has_family(name),
                f"--model-impl native: {name} accepts images, so that it needs transformers' code for them; "
                "--model-impl auto computes its text natively if it can",
            )
            return read_config(config)
        if self.model_impl != "auto" or not is_native(config):
            return NotNative()
        try:
            return read_config(config)
        except NotInFamily as error:
            return NotNative(str(error))
