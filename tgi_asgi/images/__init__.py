"""Images: fetching them, and decoding bytes to pixels. Knows neither requests nor models."""
