"""What `tgi-asgi` does besides serving: each module has one click command, which `cli.py` imports by name."""
