"""The HTTP surface: the only place that knows Starlette, status codes and headers.

Reads the fleet, never changes a model's state but through it.
"""
