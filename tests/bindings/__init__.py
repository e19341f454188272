"""Implementations that can be held to the properties with `--binding`."""
