"""Chat templates, and what keeps them in bounds: messages to prompt text."""
