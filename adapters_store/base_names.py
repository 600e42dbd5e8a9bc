"""What ``base_model_name_or_path`` says about the base an adapter was trained on: a hint, never a reason.

Real ones name the model, a quantised copy of it (``unsloth/SmolLM2-135M-Instruct-bnb-4bit``), a folder on the
machine that trained (``/content/out/checkpoint-60``), or nothing. Shapes decide what is served; whatever
doesn't name this base is a warning.
"""

from __future__ import annotations

import re

from tunefleet.adapters_store.strict_json import shown

_QUANTISED = re.compile(
    r"(-(unsloth|bnb-\d+bit|bnb|\d+bit|int[48]|fp8|fp4|nf4|awq|gptq|gguf|hqq|aqlm|mlx|dynamic|w\d+a\d+))+"
)
_FOLDER = re.compile(r"[/.~\\]|[A-Za-z]:[\\/]")


def base_warning(hint: str | None, base: str) -> str | None:
    """A sentence where ``hint`` doesn't name ``base``; None where it does, whatever owner and case."""
    if not hint:
        return "base_model_name_or_path is empty: nothing says which base it was trained on; its shapes fit"
    told, name = f"base_model_name_or_path is {shown(hint)}", last_part(hint)
    if name == base.lower():
        return None
    if is_quantised(name, base.lower()):
        return f"{told}, a quantised copy of {base}: answers differ slightly from those in training"
    if _FOLDER.match(hint):
        return f"{told}, a folder where it was trained: make sure that it held {base}; its shapes fit"
    return f"{told}, this base is {base}; its shapes fit"


def is_quantised(name: str, base: str) -> bool:
    """Whether ``name`` is ``base`` and then only words for ways to quantise."""
    return name.startswith(base) and _QUANTISED.fullmatch(name[len(base) :]) is not None


def last_part(hint: str) -> str:
    """A Hugging Face id without its owner, a path's last folder; in lower case."""
    return re.split(r"[/\\]", hint.rstrip("/\\"))[-1].lower()
