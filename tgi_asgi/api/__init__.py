"""Wire formats, routes, errors. Depends on the engine's protocols, never on torch or the scheduler."""
