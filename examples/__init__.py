"""Runnable examples, and the adapters of the demo."""
