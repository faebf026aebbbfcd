"""TGI's own API: generating, tokenising, and what clouds call."""
