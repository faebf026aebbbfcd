"""Turn requests into sequences and steps: the scheduler, the block pool and the engine coroutine."""
