"""Fetch a model's files from the Hugging Face Hub, through `huggingface_hub` and its own settings.

HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean there.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.types import Progress

# Weights under other names (`consolidated*`, adapters) would be a second copy or of no use.
PATTERNS = ("*.json", "*.jinja", "model*.safetensors", "*_Dense/model.safetensors")
CODE_PATTERNS = ("*.py",)  # of models that bring code of their own, for those who trust it
ADAPTER_PATTERNS = ("adapter_config.json", "adapter_model.safetensors")
_IGNORED = ["original/*", "onnx/*", "openvino/*", "metal/*"]


def fetch(
    repo_id: str, revision: str | None, progress: Progress, *, patterns: Sequence[str] = PATTERNS
) -> tuple[Path, str]:
    """Download what is missing of a repository's configuration, tokenizer, templates and safetensors.

    Args:
        patterns: of the files that are wanted, if not these.

    Returns:
        The snapshot's directory, and the commit that it is of.

    Raises:
        ModelLoadError: with the Hub's own reason and what to do about it.
    """
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{repo_id} at {revision}" if revision else repo_id
    try:
        path = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=_IGNORED,
            tqdm_class=_reporting_bar(f"downloading {where}", progress),
        )
    except errors.GatedRepoError:
        raise ModelLoadError(
            f"{repo_id} is gated: accept its terms on the Hub and set HF_TOKEN to a token of that account"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelLoadError(f"{repo_id} has no revision {revision!r} on the Hub") from None
    except errors.RepositoryNotFoundError:
        raise ModelLoadError(
            f"no model {repo_id!r}: it is neither a file or directory here nor a repository on the Hub "
            "(a private one needs HF_TOKEN)"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"{where} is no file or directory here and not in the Hub's cache, and the Hub cannot be reached "
            f"(no network, or HF_HUB_OFFLINE is set): {_first_line(error)}"
        ) from None
    # The client has another tree of network errors in each major version, and none of them is our bug.
    except Exception as error:
        raise ModelLoadError(f"cannot download {where} from the Hub: {_first_line(error)}") from error
    if not Path(path).is_dir():
        raise ModelLoadError(f"{where} has none of the files that are wanted ({', '.join(patterns)})")
    return Path(path), Path(path).name


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _reporting_bar(stage: str, progress: Progress) -> Any:
    """Make a tqdm class that prints nothing and reports the bytes of its furthest bar."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    lock = threading.Lock()
    furthest = 0

    class ReportingBar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread that watches over bars nobody sees

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            kwargs["disable"] = False
            kwargs["file"] = io.StringIO()  # closing a bar ends its line, also of one that is not shown
            super().__init__(*args, **kwargs)

        def display(self, *args: Any, **kwargs: Any) -> None:
            """Print nothing."""

        def update(self, n: float | None = 1) -> Any:
            nonlocal furthest
            shown = super().update(n)
            # Files are counted by another bar; newer versions have two bars in bytes (received, written).
            if self.unit == "B":
                with lock:
                    furthest = max(furthest, int(self.n))
                    progress(stage, furthest, int(self.total) if self.total else None)
            return shown

    return ReportingBar
