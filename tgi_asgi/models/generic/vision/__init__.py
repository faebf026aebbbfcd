"""Vision models of `transformers`: a tower encodes an image to rows that replace its placeholder tokens.

`text` finds the decoder in such a model, `processor` converts images to the tower's inputs, `tower` runs the
tower in pieces, `sequence_images` records which images each sequence sees and where, `program` runs steps.
`docs/images.md` describes all of it.
"""
