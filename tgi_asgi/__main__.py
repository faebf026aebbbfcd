"""`python -m tgi_asgi`."""

from tgi_asgi.cli import main

main()
