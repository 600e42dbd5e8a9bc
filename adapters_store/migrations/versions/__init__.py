"""One module per step, each additive."""
