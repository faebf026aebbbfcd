"""List and fetch files of the Hugging Face Hub, through `huggingface_hub` and its own settings.

HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE have the same meaning as there.
`hub_models.py` decides which files a model needs.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.types import Progress, no_progress

logger = logging.getLogger(__name__)

_NOTHING = ("?*\n",)  # a pattern that matches no file name


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at a revision."""

    names: frozenset[str]
    is_cached: bool  # whether the Hub could not be asked, so that these are the files already on disk


def list_files(repo_id: str, revision: str | None) -> Listing:
    """List a repository's files on the Hub, or those in its cache if the Hub cannot be asked.

    Raises:
        ModelLoadError: as `fetch`.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        # Without a limit the client waits for ever, and a firewall may drop everything that is sent.
        found = huggingface_hub.HfApi().model_info(
            repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        return Listing(frozenset(each.rfilename for each in found.siblings or ()), is_cached=False)
    except errors.RevisionNotFoundError:
        raise _no_revision(repo_id, revision) from None
    except errors.HfHubHTTPError:  # the client falls back on its cache, or says why it cannot
        folder, _ = fetch(repo_id, revision, no_progress, patterns=_NOTHING)
    except Exception as error:
        folder = _cached_folder(repo_id, revision, error)
        if not constants.HF_HUB_OFFLINE:
            reason = f"{type(error).__name__}: {_first_line(error)}"
            logger.warning("%s: the Hub cannot be asked (%s), its cache is used", repo_id, reason)
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Listing(frozenset(names), is_cached=True)


def _cached_folder(repo_id: str, revision: str | None, error: Exception) -> Path:
    """Return the folder of a repository in the cache, after an error that is not the Hub's answer.

    The client itself looks there only after some of these: not after those of a proxy, and not if the
    connection is reset or another program answers. And it would wait for the Hub again, without a limit.

    Raises:
        ModelLoadError: if there is none.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=list(_NOTHING), local_files_only=True
        )
    except errors.LocalEntryNotFoundError:
        raise _unreachable(repo_id, revision, error) from None
    except Exception as refused:  # the id cannot be that of a repository
        raise ModelLoadError(f"cannot look for {repo_id} on the Hub: {_first_line(refused)}") from refused
    return Path(found)


def fetch(
    repo_id: str,
    revision: str | None,
    progress: Progress,
    *,
    patterns: Sequence[str],
    is_cached: bool = False,
) -> tuple[Path, str]:
    """Download the missing files of a repository that match these patterns.

    Args:
        is_cached: Whether they are known to be in the cache: the Hub is not asked again.

    Returns:
        The snapshot's directory, and its commit.

    Raises:
        ModelLoadError: with the Hub's own reason and what to do about it.
    """
    import huggingface_hub
    from huggingface_hub import errors

    where = _where(repo_id, revision)
    try:
        path = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(patterns),
            local_files_only=is_cached,
            tqdm_class=_reporting_bar(f"downloading {where}", progress),
        )
    except errors.GatedRepoError:
        raise ModelLoadError(
            f"{repo_id} is gated: accept its terms on the Hub and set HF_TOKEN to a token of that account"
        ) from None
    except errors.RevisionNotFoundError:
        raise _no_revision(repo_id, revision) from None
    except errors.RepositoryNotFoundError:
        raise ModelLoadError(
            f"no model {repo_id!r}: it is neither a file or directory here nor a repository on the Hub "
            "(a private one needs HF_TOKEN)"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(repo_id, revision, error) from None
    # `huggingface_hub` changes its network exceptions with each major version; none of them is a bug here.
    except Exception as error:
        raise ModelLoadError(f"cannot download {where} from the Hub: {_first_line(error)}") from error
    if not Path(path).is_dir():
        raise ModelLoadError(f"{where} has none of the files that are wanted ({', '.join(patterns)})")
    return Path(path), Path(path).name


def _where(repo_id: str, revision: str | None) -> str:
    return f"{repo_id} at {revision}" if revision else repo_id


def _unreachable(repo_id: str, revision: str | None, error: Exception) -> ModelLoadError:
    return ModelLoadError(
        f"{_where(repo_id, revision)} is neither a file or directory here nor in the Hub's cache, and the "
        f"Hub cannot be reached (no network, or HF_HUB_OFFLINE is set): {_first_line(error)}"
    )


def _no_revision(repo_id: str, revision: str | None) -> ModelLoadError:
    return ModelLoadError(f"{repo_id} has no revision {revision!r} on the Hub")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _reporting_bar(stage: str, progress: Progress) -> Any:
    """Return a tqdm class that prints nothing and reports the bytes of its most advanced bar."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    lock = threading.Lock()
    furthest = 0

    class ReportingBar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no monitor thread for bars that are not shown

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            kwargs["disable"] = False
            kwargs["file"] = io.StringIO()  # closing even a hidden bar ends its line
            super().__init__(*args, **kwargs)

        def display(self, *args: Any, **kwargs: Any) -> None:
            """Print nothing."""

        def update(self, n: float | None = 1) -> Any:
            nonlocal furthest
            shown = super().update(n)
            # Another bar counts files; newer versions have two bars in bytes (received, written).
            if self.unit == "B":
                with lock:
                    furthest = max(furthest, int(self.n))
                    progress(stage, furthest, int(self.total) if self.total else None)
            return shown

    return ReportingBar
