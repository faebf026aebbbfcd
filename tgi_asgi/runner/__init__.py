"""Runs step plans on a device: buffers, the KV pool, sampling state. Contains no scheduling policy."""
