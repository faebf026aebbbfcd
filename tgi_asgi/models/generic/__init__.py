"""Any decoder of `transformers`: its own module, with our products, norms, attention and cache under it.

`build` makes the module without weights, `discover` learns what each attention layer is, `weights` fills it,
`program` runs steps of it. `docs/generic.md` tells the whole story.
"""
