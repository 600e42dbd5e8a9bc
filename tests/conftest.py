"""Fixtures and settings of all tests."""

from __future__ import annotations

import os

# Tiny tensors on many threads cost more in waking threads than in work; before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
