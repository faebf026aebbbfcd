"""Any decoder of `transformers`: its own module, on native products, norms, attention and cache.

`build` makes the module without weights, `discover` finds the properties of each attention layer, `weights`
fills the module, `program` runs steps of it. `docs/generic.md` describes all of it.
"""
