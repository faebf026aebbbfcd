"""Model files: where they come from and what is in them, every header checked. A leaf without torch."""
