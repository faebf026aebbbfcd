"""What is known of a route besides its handler: for checks, metrics and logs."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field


class Access(enum.Enum):
    """Who may call a route if there are API keys."""

    OPEN = "open"  # anyone: orchestrators and Prometheus send no key
    BROWSER = "browser"  # browsers, which send no key for a page; others need a key
    KEY = "key"
    ADMIN = "admin"  # always requires the administrator's admin key


@dataclass(frozen=True, slots=True)
class RouteTraits:
    """One method of one path.

    Attributes:
        generates: Whether it generates text, and counts as a request in the metrics.
        is_quiet: Whether it is a probe or scrape, logged only if it fails.
        requests: Types that the body may have. If there are several, its main field selects the type and
            whether errors have TGI's envelope or OpenAI's.
        needs_body: Whether a request without a body is refused; otherwise it means the same as `{}`.
    """

    method: str
    path: str
    access: Access = field(default=Access.KEY, kw_only=True)
    generates: bool = field(default=False, kw_only=True)
    is_quiet: bool = field(default=False, kw_only=True)
    requests: Sequence[type] = field(default=(), kw_only=True)
    needs_body: bool = field(default=True, kw_only=True)
