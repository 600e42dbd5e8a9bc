"""Uploads that are none: tables that tests of one layer and tests of the whole way share."""
