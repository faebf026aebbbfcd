"""TGI's own API: generation, tokenisation, and cloud platforms' routes."""
