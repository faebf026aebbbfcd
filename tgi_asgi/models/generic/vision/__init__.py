"""Models of `transformers` that see: a tower makes rows of an image, which take the place of its tokens.

`text` finds the decoder in such a model, `processor` makes of pictures what the tower takes, `tower` runs it
piece by piece, `sight` says what each sequence sees where, `program` runs steps. `docs/images.md` tells the
whole story.
"""
