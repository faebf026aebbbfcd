"""The public operators: one file each with argument checks, docstring and meta function."""
