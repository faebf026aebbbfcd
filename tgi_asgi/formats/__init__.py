"""Model files: where they come from and what they contain, all headers checked. A leaf without torch."""
