"""One module a family of models, or for those that share a code; `registry.py` finds them by themselves."""
