"""adapter_config.json, read by allow-list.

Whatever would change the answers and is not served is refused by name; an unknown field is tolerated only
while it is null, false or empty. What is served gives exactly the rank and scaling that PEFT 0.21 computes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from tunefleet.adapters_store.strict_json import JsonInvalid, JsonValue, parse_object, shown
from tunefleet.errors import AdapterInvalid

MAX_CONFIG_BYTES = 64 * 1024
MAX_DEPTH = 8
MAX_PATTERNS = 4096
DEFAULT_R = 8
DEFAULT_ALPHA = 8.0

_PATTERN_KEY = re.compile(r"\^?[A-Za-z0-9_.\-]{1,512}")
_DOTTED_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,255}")

# Fields that say how an adapter was trained or which modules were chosen: the tensors themselves decide here.
_WITHOUT_EFFECT = frozenset(
    {
        "base_model_name_or_path",
        "corda_config",  # used with init_lora_weights "corda" only, which is refused
        "ensure_weight_tying",  # concerns embeddings, whose tensors are refused
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",  # as corda_config
        "lora_dropout",
        "lora_dtype",  # ms-swift: of training
        "lora_ga_config",  # as corda_config
        "lorap_emb_lr",  # ms-swift: a learning rate
        "lorap_lr_ratio",
        "megatron_core",  # a module's name: never imported
        "peft_version",
        "qalora_group_size",  # used with use_qalora only, which is refused
        "revision",
        "runtime_config",
        "task_type",
    }
)

# Field -> why it is refused once it is active.
_NOT_SERVED = {
    "alora_invocation_tokens": "activated LoRA applies from certain tokens on, which is not served",
    "arrow_config": "Arrow routing between adapters is not served",
    "kasa_config": "KaSA truncates the base's weights, which all users share",
    "layer_replication": "it changes the base model, which all users share",
    "lora_bias": "biases on lora_B are not served: train with lora_bias=false",
    "megatron_config": "Megatron layers are not served",
    "modules_to_save": "whole trained modules are not served: train with LoRA on linear layers only",
    "monteclora_config": "MonteCLoRA's sampling is not served",
    "target_parameters": "LoRA on bare parameters (e.g. fused experts) is not served",
    "trainable_token_indices": "trained token embeddings are not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "use_dora": "DoRA is not served: train with use_dora=false",
    "use_qalora": "QALoRA is not served",
    "velora_config": "VeLoRA is not served",
}
# For these PEFT takes an empty object for "with all defaults", so it is active.
_ACTIVE_WHEN_EMPTY = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
        "use_bdlora",
        "velora_config",
    }
)

_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class ModuleScale(NamedTuple):
    """What the config says about one module."""

    rank: int
    scaling: float


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The served part of an adapter_config.json. Patterns keep the file's order: the first match wins."""

    r: int = DEFAULT_R
    lora_alpha: float = DEFAULT_ALPHA
    use_rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    fan_in_fan_out: bool = False
    bias: str = "none"
    target_modules: tuple[str, ...] | str | None = None  # a hint: the tensors decide
    base_model_name_or_path: str | None = None  # a hint: shapes decide
    task_type: str | None = None

    def module_scale(self, path: str) -> ModuleScale:
        """Rank and scaling of the module at ``path``, as PEFT's LoraModel and LoraLayer compute them."""
        rank = next((rank for key, rank in self.rank_pattern if matches(key, path)), self.r)
        alpha = next((alpha for key, alpha in self.alpha_pattern if matches(key, path)), self.lora_alpha)
        return ModuleScale(rank, alpha / math.sqrt(rank) if self.use_rslora else alpha / rank)


def matches(key: str, path: str) -> bool:
    """Whether a pattern key means this module.

    PEFT matches ``(.*\\.)?(KEY)$`` from the start of the path (``peft.utils.other.get_pattern_key``). Keys
    here hold no metacharacters but ``.`` (any one character there, so here too) and a leading ``^`` (the
    whole path, as in PEFT's own documentation); no regex from a stranger is ever compiled.
    """
    literal = key.removeprefix("^")
    start = len(path) - len(literal)
    if start < 0 or (start > 0 and (key.startswith("^") or path[start - 1] != ".")):
        return False
    return all(expected in (".", actual) for expected, actual in zip(literal, path[start:], strict=True))


def parse_lora_config(raw: bytes) -> LoraConfig:
    """Reads the bytes of an adapter_config.json.

    Raises:
        AdapterInvalid: ``invalid_adapter_config`` or ``unsupported_feature``, ``param`` naming the field.
    """
    if len(raw) > MAX_CONFIG_BYTES:
        raise _invalid(None, f"it has {len(raw)} bytes, the limit is {MAX_CONFIG_BYTES}")
    try:
        fields = parse_object(raw, max_depth=MAX_DEPTH)
    except JsonInvalid as error:
        raise _invalid(None, str(error)) from error
    _check_peft_type(fields.pop("peft_type", None))
    _check_init(fields.pop("init_lora_weights", True))
    _check_auto_mapping(fields.pop("auto_mapping", None))
    config = LoraConfig(
        r=_rank("r", fields.pop("r", DEFAULT_R)),
        lora_alpha=_alpha("lora_alpha", fields.pop("lora_alpha", DEFAULT_ALPHA)),
        use_rslora=_flag(fields, "use_rslora"),
        rank_pattern=tuple(
            (key, _rank(name, value)) for key, name, value in _pattern(fields, "rank_pattern")
        ),
        alpha_pattern=tuple(
            (key, _alpha(name, value)) for key, name, value in _pattern(fields, "alpha_pattern")
        ),
        fan_in_fan_out=_flag(fields, "fan_in_fan_out"),
        bias=_bias(fields.pop("bias", "none")),
        target_modules=_target_modules(fields.pop("target_modules", None)),
        base_model_name_or_path=_hint(fields, "base_model_name_or_path"),
        task_type=_hint(fields, "task_type"),
    )
    for name, value in fields.items():
        _check_other(name, value)
    return config


def _check_peft_type(value: JsonValue) -> None:
    if value == "LORA":
        return
    if value is None:
        raise _invalid("peft_type", "is missing; only LORA is served")
    raise _unsupported("peft_type", f"is {_described(value)}; only LORA is served: train with LoraConfig")


def _check_init(value: JsonValue) -> None:
    """An init leaves no trace in a trained adapter, unless it moved a part of the base into it."""
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str):
        raise _invalid("init_lora_weights", f"is {_described(value)}, not true, false or a name")
    if value.lower() in _HARMLESS_INITS:
        return
    if value.lower().startswith(_BASE_CHANGING_INITS):
        raise _unsupported(
            "init_lora_weights",
            f"is {shown(value)}, which trains against a changed base; save the adapter with "
            "path_initial_model_for_weight_conversion, which turns it into a plain LoRA",
        )
    raise _unsupported(
        "init_lora_weights", f"is {shown(value)}, which is not known here: train with init_lora_weights=true"
    )


def _check_auto_mapping(value: JsonValue) -> None:
    """PEFT writes the base's class here when task_type is null. Nothing is ever imported by it."""
    if not value:
        return
    if not isinstance(value, dict) or value.keys() - {"base_model_class", "parent_library", "unsloth_fixed"}:
        raise _unsupported(
            "auto_mapping", "holds something else than the base's class, which is never loaded"
        )
    names = [value.get("base_model_class", ""), value.get("parent_library", "")]
    if not all(isinstance(name, str) and (not name or _DOTTED_NAME.fullmatch(name)) for name in names):
        raise _unsupported("auto_mapping", "names a class that is not a dotted name")


def _check_other(name: str, value: JsonValue) -> None:
    if name in _WITHOUT_EFFECT or value is None or value is False:
        return
    reason = _NOT_SERVED.get(name)
    is_empty = value == "" or value == [] or value == {}
    if is_empty and name not in _ACTIVE_WHEN_EMPTY:
        return
    if reason is None:
        raise _unsupported(
            name, f"is not known here and is set to {_described(value)}; remove it if it has no effect"
        )
    advice = "" if "train with" in reason else ": train without it"
    raise _unsupported(name, f"is set: {reason}{advice}")


def _rank(name: str, value: JsonValue) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _invalid(name, f"must be a whole number of at least 1, not {_described(value)}")
    return value


def _alpha(name: str, value: JsonValue) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid(name, f"must be a number, not {_described(value)}")
    if not math.isfinite(value) or value == 0:
        raise _invalid(name, f"must be finite and not 0, not {_described(value)}")
    return float(value)


def _flag(fields: dict[str, JsonValue], name: str) -> bool:
    value = fields.pop(name, None)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _invalid(name, f"must be true or false, not {_described(value)}")


def _pattern(fields: dict[str, JsonValue], name: str) -> list[tuple[str, str, JsonValue]]:
    """``(key, field name for messages, value)`` of a pattern, in the file's order."""
    pattern = fields.pop(name, None)
    if pattern is None:
        return []
    if not isinstance(pattern, dict) or len(pattern) > MAX_PATTERNS:
        raise _invalid(name, f"must be an object of at most {MAX_PATTERNS} keys")
    for key in pattern:
        if not _PATTERN_KEY.fullmatch(key):
            raise _unsupported(
                name, f"has the key {shown(key)}: only module names of A-Z a-z 0-9 _ . - are served, no regex"
            )
    return [(key, f"{name}.{key}", value) for key, value in pattern.items()]


def _bias(value: JsonValue) -> str:
    """Trained biases are tensors and refused as such; without any, this field has no effect."""
    if value is None:
        return "none"
    if isinstance(value, str) and value in {"none", "all", "lora_only"}:
        return value
    raise _unsupported("bias", f"is {_described(value)}, not none, all or lora_only")


def _target_modules(value: JsonValue) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        names = tuple(item for item in value if isinstance(item, str))
        if len(names) == len(value):
            return names
    raise _invalid("target_modules", "must be a list of names or a string")


def _hint(fields: Mapping[str, JsonValue], name: str) -> str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    raise _invalid(name, f"must be text, not {_described(value)}")


def _described(value: JsonValue) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return shown(value) if isinstance(value, str) else json.dumps(value)


def _invalid(field: str | None, problem: str) -> AdapterInvalid:
    where = f"adapter_config.json: {field} {problem}" if field else f"adapter_config.json: {problem}"
    return AdapterInvalid(where, code="invalid_adapter_config", param=field or "adapter_config.json")


def _unsupported(field: str, problem: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"adapter_config.json: {shown(field)[1:-1]} {problem}", code="unsupported_feature", param=field[:128]
    )
