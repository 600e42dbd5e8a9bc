"""The catalog's schema through time; Alembic runs these when a catalog is opened."""
