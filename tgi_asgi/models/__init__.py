"""Model families, one short file each, written over `ops`; and the loading of their weights by name."""
