"""What an output must match: schemas, regular expressions and grammars, down to masks of tokens."""
