"""Wire formats, routes, errors, metrics. Knows the engine's protocols, never torch or the scheduler."""
