"""Anthropic's API: what its clients send, and the exact shapes they expect back."""
