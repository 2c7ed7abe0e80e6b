"""Recipes: one file a run, each a `get_config()` of plain values that reads without JAX."""
