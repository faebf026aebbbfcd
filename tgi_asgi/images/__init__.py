"""Pictures: where they come from, and from bytes to pixels. Knows neither requests nor models."""
