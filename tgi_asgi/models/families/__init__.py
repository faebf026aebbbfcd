"""One module per model family, or per group of families that share code; `registry.py` discovers them."""
