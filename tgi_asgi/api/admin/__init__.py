"""What operators and machines ask of a server: health, metrics, what is served, and what may be done to it."""
