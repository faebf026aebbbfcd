"""Runs step plans on a device: buffers, the KV pool, sampling state. Knows no scheduling policy."""
