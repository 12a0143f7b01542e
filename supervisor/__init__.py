"""The one process that owns readiness, containment and the HTTP surface.

Never imports an inference library: see DESIGN and ``tests/unit/test_imports.py``.
"""
