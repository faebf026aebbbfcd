"""A `transformers` module without weights: parameters on the meta device, buffers real.

Buffers (rotary frequencies, multipliers, scales) are computed when a module is created, so building
everything on the meta device would lose them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.rope import scale_positions
from tgi_asgi.settings import GivenRope


def build(
    directory: Path | None,
    config: Mapping[str, Any],
    *,
    trusts_code: bool = False,
    rope: GivenRope | None = None,
    vocab_size: int | None = None,
) -> Any:
    """Return a `PreTrainedModel` in evaluation mode, float32, with all parameters on the meta device.

    Args:
        directory: That of the checkpoint; None for a GGUF file.
        config: The model's config.json, which names an architecture; for a GGUF file what stands for it.
        trusts_code: Whether code that the checkpoint brings may be run.
        rope: Position scaling that replaces the configuration's.
        vocab_size: Size of the vocabulary that replaces the configuration's.

    Raises:
        ModelLoadError: if `transformers` does not know the architecture or cannot build it.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # it warns about kernels that no CPU has
    torch.set_num_threads(1)  # others would compete with the team
    architecture = str(config["architectures"][0])
    has_code = "auto_map" in config
    model_class = getattr(transformers, architecture, None)
    try:
        if model_class is None and not (has_code and trusts_code):
            raise ModelLoadError(_unknown(architecture, has_code, transformers.__version__))
        if directory is None:
            parsed = transformers.AutoConfig.for_model(**config)
        else:
            parsed = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trusts_code)
        parsed = getattr(parsed, "thinker_config", parsed)  # of Qwen-Omni, the part that writes
        for part in (parsed, parsed.get_text_config()):
            if vocab_size is not None:
                part.vocab_size = vocab_size
            if getattr(part, "quantization_config", None) is not None:
                del part.quantization_config  # the server's own readers handle it
        if rope is not None:
            scale_positions(parsed.get_text_config(), rope)
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        with _without_weights():
            if model_class is None:
                model = transformers.AutoModelForCausalLM.from_config(
                    parsed, trust_remote_code=True, **options
                )
            else:
                model = model_class._from_config(parsed, **options)
    except ModelLoadError:
        raise
    except Exception as error:  # a configuration can make a `transformers` class raise anything
        raise ModelLoadError(f"transformers cannot build {architecture}: {_one_line(error)}") from error
    model.requires_grad_(False)
    return model.eval()


def _unknown(architecture: str, has_code: bool, version: str) -> str:
    if has_code:
        return (
            f"models of architecture {architecture!r} bring code of their own: --trust-remote-code runs it, "
            "with all rights of this process"
        )
    return (
        f"models of architecture {architecture!r} are not supported: neither this server nor transformers "
        f"{version} has it"
    )


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            made = nn.Parameter(param.detach().to("meta"), requires_grad=False)
            made.__dict__.update(param.__dict__)
            param = made
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _one_line(error: Exception) -> str:
    """Return an error's type and message, which may go on in further lines: a validation's reason does."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
