"""adapter_config.json as it can't be served."""

from __future__ import annotations

NOT_OBJECTS = {
    "empty": b"",
    "not JSON": b"{r: 8}",
    "a list": b"[]",
    "a string": b'"LORA"',
    "null": b"null",
    "byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"peft_type": "LORA"}'.encode("utf-16"),
    "10 MB": b'{"peft_type": "LORA", "x": "' + b"a" * 10_000_000 + b'"}',
    "deep": b'{"peft_type": "LORA", "x": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "same key twice": b'{"peft_type": "LORA", "r": 8, "r": 4}',
    "NaN": b'{"peft_type": "LORA", "lora_alpha": NaN}',
    "Infinity": b'{"peft_type": "LORA", "lora_alpha": Infinity}',
    "a number of 5000 digits": b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
}


def each(field: str, *values: object) -> list[tuple[str, object]]:
    return [(field, value) for value in values]


WRONG_FIELDS: list[tuple[str, object]] = [
    *each("r", 0, -4, 4.0, 8.5, "8", True, None, [8]),
    *each("lora_alpha", 0, 0.0, "16", True, None, [16]),
    *each("use_rslora", 1, "true", []),
    *each("fan_in_fan_out", 1, "no"),
    *each("rank_pattern", [], "q_proj", 4),
    *each("alpha_pattern", [], {f"m{n}": 1 for n in range(5000)}),
    *each("target_modules", 7, {"q": 1}, ["q_proj", 1]),
    ("base_model_name_or_path", 5),
    ("task_type", {}),
    ("init_lora_weights", 3),
]

NOT_SERVED: list[tuple[str, object]] = [
    ("use_dora", True),
    ("modules_to_save", ["lm_head"]),
    ("trainable_token_indices", [1, 2]),
    ("target_parameters", ["mlp.experts.gate_up_proj"]),
    ("layer_replication", [[0, 4], [2, 5]]),
    ("alora_invocation_tokens", [1]),
    ("alora_invocation_tokens", []),
    ("use_qalora", True),
    ("use_bdlora", {}),
    ("arrow_config", {}),
    ("kasa_config", {}),
    ("velora_config", {}),
    ("monteclora_config", {"x": 1}),
    ("megatron_config", {"a": 1}),
    ("lora_bias", True),
    ("auto_mapping", {"parent_library": "os", "func": "system"}),
    ("auto_mapping", {"parent_library": "os; import x"}),
    ("auto_mapping", ["os"]),
    ("bias", "some"),
    ("bias", True),
    ("peft_type", "VERA"),
    ("peft_type", "ADALORA"),
    ("peft_type", "lora"),
    ("peft_type", ["LORA"]),
    ("a_field_of_tomorrow", True),
    ("a_field_of_tomorrow", 0),
    ("a_field_of_tomorrow", "on"),
    ("a_field_of_tomorrow", {"x": None}),
    ("rank_pattern", {"(a+)+$": 4}),
    ("rank_pattern", {"layers\\.0": 4}),
    ("rank_pattern", {".*": 4}),
    ("rank_pattern", {"": 4}),
    ("rank_pattern", {"q_proj|v_proj": 4}),
    ("alpha_pattern", {"q_proj$": 4}),
    ("alpha_pattern", {"q^proj": 4}),
    *each(
        "init_lora_weights",
        "pissa",
        "pissa_niter_16",
        "PiSSA",
        "olora",
        "OLoRA",
        "corda",
        "loftq",
        "lora_ga",
        "new",
    ),
]
