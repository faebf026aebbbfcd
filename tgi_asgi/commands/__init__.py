"""Subcommands of `tgi-asgi`: each module has one click command, which `cli.py` imports by name."""
