"""Reasoning annotations: reading those there are, and making those there are not."""
