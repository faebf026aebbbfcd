"""Requests become sequences become steps: the scheduler, the block pool and the one engine coroutine."""
