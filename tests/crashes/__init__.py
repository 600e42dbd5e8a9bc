"""Processes that die at a step of what they do to the store, and what must be there afterwards."""
