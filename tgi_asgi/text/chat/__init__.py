"""Chat templates and their limits: messages to prompt text."""
