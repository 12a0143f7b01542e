"""A model's files as they lie on disk: for the gate, before a load, and for the worker in it.

The worker looks again: files change between the two, a draft model has passed no gate, and
what its library says of an incomplete folder is at times a crash. Imports the standard
library and msgspec only.
"""
