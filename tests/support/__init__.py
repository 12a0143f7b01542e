"""Makers of the small models that the tests run on."""
