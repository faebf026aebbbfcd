"""`python -m tgi_asgi`."""

from __future__ import annotations

from tgi_asgi.cli import main

main()
