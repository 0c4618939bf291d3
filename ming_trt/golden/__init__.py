"""Reference cases: reading them, comparing with them, replaying them through built engines."""
