"""Native model families, one short file each, written over `ops`, and the loading of weights by name."""
