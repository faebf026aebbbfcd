"""What operators and machines ask of a server: health, metrics, what it serves, what may be done to it."""
