"""Stand-ins that several test packages share."""
