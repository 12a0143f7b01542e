"""Measures Opta-LMX beside the bare backend and the servers people use instead.

``plan`` says what is asked, ``client`` and ``bare`` are the processes that ask
it, ``contenders`` start what is measured, ``workloads`` turn answers into
figures, ``compare`` runs everything in turns; ``relay`` and ``scale`` are modes
without a real model's speed in them. ``docs/performance.md`` explains the figures.
"""
