"""An adapter's identity: what it is, never what it is called.

``sha256(config + b"\\0" + weights)``, where ``weights`` is the lowercase hex sha256 of
adapter_model.safetensors and ``config`` is the served config as JSON in UTF-8: keys sorted, no spaces,
exactly the fields ``alpha_pattern``, ``lora_alpha``, ``peft_type``, ``r``, ``rank_pattern``, ``use_rslora``,
with defaults filled in. Patterns are lists of ``[key, value]`` in the file's order, because the first match
wins, so the order is part of what an adapter is. An alpha that is a whole number below 2**53 is written
without a fraction, any other as its shortest decimal that reads back equal (Python's ``repr``). Fields that
don't change answers (dropout, selectors, names) are not part of it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tunefleet.adapters_store.lora_config import LoraConfig


def served_config(config: LoraConfig) -> bytes:
    """The canonical JSON of everything in a config that affects answers."""
    fields = {
        "alpha_pattern": [[key, _number(alpha)] for key, alpha in config.alpha_pattern],
        "lora_alpha": _number(config.lora_alpha),
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": [[key, rank] for key, rank in config.rank_pattern],
        "use_rslora": config.use_rslora,
    }
    return json.dumps(
        fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def adapter_digest(config: LoraConfig, weights_sha256: str) -> str:
    """The 64 hex digits that name an adapter in every cache, slot, key and answer."""
    return hashlib.sha256(served_config(config) + b"\0" + weights_sha256.encode("ascii")).hexdigest()


def file_sha256(path: Path) -> str:
    """Lowercase hex sha256 of a file, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
