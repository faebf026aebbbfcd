"""Constrained output: from schemas, regular expressions and grammars to token masks."""
