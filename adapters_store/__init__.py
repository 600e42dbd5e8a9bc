"""Adapters as data: format and validation, catalog, objects, archives, tiers."""
