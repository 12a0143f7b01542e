"""What the supervisor and its workers say to each other.

Imports the standard library and msgspec only, so that either side can load it
without paying for the other's dependencies.
"""
