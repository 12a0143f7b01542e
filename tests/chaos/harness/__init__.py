"""The fault harness: breaks workers, supervisors and homes in every way, and measures.

``scripts/chaos`` runs all of it, ``tests/chaos`` a quick version. A case is one
fault in one phase; its row says what was seen, and every breach of the promise.
"""
