"""Which catalog decides over a store: one object per catalog that ever wrote to it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tunefleet.adapters_store.objects import ObjectStore, catalog_key
from tunefleet.errors import StoreError

_FOLDER = "catalogs/"


class CatalogMark:
    """One catalog's mark in one store. What a catalog doesn't know, another one might: see the collector."""

    def __init__(self, objects: ObjectStore, catalog_id: str, staging: Path) -> None:
        self._objects = objects
        self._key = catalog_key(catalog_id)
        self._staging = staging
        self._written = False

    def write(self) -> None:
        """Before the first object that the catalog decides over; once per process."""
        if self._written:
            return
        try:
            with tempfile.NamedTemporaryFile(dir=self._staging) as file:
                self._objects.put(self._key, Path(file.name))
        except OSError as error:
            raise StoreError(f"the upload can't be staged: {error.strerror or error}") from error
        self._written = True

    def others(self) -> list[str]:
        """Keys of the marks of other catalogs."""
        return [found.key for found in self._objects.list(_FOLDER) if found.key != self._key]
