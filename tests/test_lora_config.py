from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable

import pytest
from hypothesis import strategies as st

import hazards
from malformed.configs import NOT_OBJECTS, NOT_SERVED, WRONG_FIELDS
from malformed.generated import ACTIVE_FIELDS, IDLE_FIELDS, LAYERS, SERVED_FIELDS
from tunefleet.adapters_store import lora_config
from tunefleet.adapters_store.lora_config import LoraConfig, matches, parse_lora_config
from tunefleet.errors import AdapterInvalid


def parse(**fields: object) -> LoraConfig:
    return parse_lora_config(json.dumps({"peft_type": "LORA", **fields}).encode())


def refusal_of(raw: bytes) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as refusal:
        parse_lora_config(raw)
    return refusal.value


def refused(**fields: object) -> AdapterInvalid:
    return refusal_of(json.dumps({"peft_type": "LORA", **fields}).encode())


def test_the_smallest_config_has_pefts_defaults() -> None:
    config = parse(target_modules=["q_proj"])
    assert LoraConfig(target_modules=("q_proj",)) == config
    assert config.module_scale("model.layers.0.self_attn.q_proj") == (8, 1.0)


# What PEFT 0.21 saves for LoraConfig(r=16, ...), with every field it knows.
SAVED_BY_PEFT = {
    "task_type": "CAUSAL_LM",
    "auto_mapping": None,
    "peft_version": "0.21.2",
    "base_model_name_or_path": "unsloth/tiny",
    "revision": None,
    "inference_mode": True,
    "r": 16,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": None,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": True,
    "modules_to_save": None,
    "init_lora_weights": "eva",
    "layers_to_transform": [0, 999],
    "layers_pattern": None,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "trainable_token_indices": None,
    "loftq_config": {},
    "eva_config": {"rho": 2.0},
    "corda_config": None,
    "lora_ga_config": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "monteclora_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
}


def test_a_config_as_peft_saves_it_is_read() -> None:
    config = parse(**SAVED_BY_PEFT)
    assert config.module_scale("model.layers.0.self_attn.q_proj") == (4, 16.0)
    assert config.module_scale("model.layers.0.self_attn.v_proj") == (16, 8.0)
    assert config.base_model_name_or_path == "unsloth/tiny"


def test_every_field_of_the_installed_peft_is_known_by_name() -> None:
    from peft import LoraConfig as PeftLoraConfig

    parsed = {"peft_type", "init_lora_weights", "auto_mapping", *LoraConfig.__struct_fields__}
    known = parsed | lora_config._WITHOUT_EFFECT | lora_config._NOT_SERVED.keys()
    assert set() == {field.name for field in dataclasses.fields(PeftLoraConfig)} - known


@pytest.mark.parametrize("raw", NOT_OBJECTS.values(), ids=NOT_OBJECTS.keys())
def test_bytes_that_are_no_config_are_refused(raw: bytes) -> None:
    refusal = refusal_of(raw)
    assert (refusal.code, refusal.param) == ("invalid_adapter_config", "adapter_config.json")


@pytest.mark.parametrize(("field", "value"), WRONG_FIELDS)
def test_a_field_of_the_wrong_type_or_range_is_refused_by_name(field: str, value: object) -> None:
    refusal = refused(**{field: value})
    assert ("invalid_adapter_config", field) == (refusal.code, refusal.param)
    assert field in refusal.message


@pytest.mark.parametrize("number", [b"1e400", b"-1e400", b"1" + b"0" * 39])
def test_a_number_beyond_floats_or_sense_is_refused(number: bytes) -> None:
    refusal = refusal_of(b'{"peft_type": "LORA", "lora_alpha": ' + number + b', "r": 1e400}')
    assert refusal.code == "invalid_adapter_config"
    assert refusal.param in {"lora_alpha", "r"}


@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True, None, {}])
def test_a_bad_rank_in_a_pattern_names_its_key(value: object) -> None:
    refusal = refused(rank_pattern={"q_proj": 4, "v_proj": value})
    assert (refusal.code, refusal.param) == ("invalid_adapter_config", "rank_pattern.v_proj")


@pytest.mark.parametrize(("field", "value"), NOT_SERVED)
def test_what_is_not_served_is_refused_by_name(field: str, value: object) -> None:
    refusal = refused(**{field: value})
    assert ("unsupported_feature", field) == (refusal.code, refusal.param)
    assert field in refusal.message


def test_a_config_without_peft_type_is_refused() -> None:
    refusal = refusal_of(b'{"r": 8}')
    assert (refusal.code, refusal.param) == ("invalid_adapter_config", "peft_type")


INACTIVE: dict[str, dict[str, object]] = {
    "unknown and null": {"a_field_of_tomorrow": None},
    "unknown and false": {"a_field_of_tomorrow": False},
    "unknown and an empty list": {"a_field_of_tomorrow": []},
    "unknown and an empty object": {"a_field_of_tomorrow": {}},
    "unknown and an empty text": {"a_field_of_tomorrow": ""},
    "known and empty": {
        "use_dora": None,
        "modules_to_save": [],
        "layer_replication": [],
        "target_parameters": [],
    },
    "served and null": {"rank_pattern": None, "alpha_pattern": None, "bias": None, "use_rslora": None},
    **{
        f"init {value}": {"init_lora_weights": value}
        for value in (None, True, False, "gaussian", "eva", "orthogonal", "mica")
    },
    "bias all": {"bias": "all"},
    "ReDoS": {"target_modules": "(a+)+$"},
    "no module": {"target_modules": []},
    "any module": {"target_modules": ".*"},
    "runtime_config": {"runtime_config": {"ephemeral_gpu_offload": True}},
    "a module to import": {"megatron_core": "os"},
    "auto_mapping by PEFT": {
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.x",
        }
    },
    "auto_mapping by Unsloth": {
        "auto_mapping": {"base_model_class": "A", "parent_library": "b", "unsloth_fixed": True}
    },
    "alpha negative": {"lora_alpha": -16},
    "layers that are not there": {"layers_to_transform": [999]},
}


@pytest.mark.parametrize("fields", INACTIVE.values(), ids=INACTIVE)
def test_what_has_no_effect_on_answers_is_accepted(fields: dict[str, object]) -> None:
    assert parse(**fields).r == 8


# Every key that is accepted, against PEFT's own rule.
KEYS = st.text("ab._^", min_size=1, max_size=6).filter(lambda key: lora_config._PATTERN_KEY.fullmatch(key))
PATHS = st.text("ab.", min_size=1, max_size=10)


@hazards.examples(400)
def test_a_pattern_key_means_what_it_means_to_peft(num_examples: int) -> None:
    from peft.utils.other import get_pattern_key

    def check(key: str, path: str) -> None:
        hit = object()
        found = {key: hit}.get(get_pattern_key([key], path)) is hit
        assert (found and bool(re.match(rf"(.*\.)?({key})$", path))) is matches(key, path)

    hazards.generate("B", num_examples, check, KEYS, PATHS)


@pytest.mark.parametrize(
    ("key", "path", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("attn.q_proj", "model.layers.0.self_attn.q_proj", False),
        ("0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", False),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("^model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("^q_proj", "model.layers.0.self_attn.q_proj", False),
        ("q.proj", "model.layers.0.self_attn.q_proj", True),
    ],
)
def test_pattern_keys_match_whole_names_from_the_end(key: str, path: str, expected: bool) -> None:
    assert expected is matches(key, path)


@pytest.fixture(scope="module")
def peft_scales() -> Callable[..., dict[str, tuple[int, float]]]:
    """A function from LoraConfig keywords to PEFT's own (rank, scaling) per module of a tiny Llama."""
    import torch
    from peft import LoraConfig as PeftLoraConfig
    from peft.tuners.lora import LoraModel
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=4,
    )

    def scales(**fields: object) -> dict[str, tuple[int, float]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # keys that match nothing
            with torch.device("meta"):
                model = LlamaForCausalLM(tiny)
                peft = LoraModel(model, PeftLoraConfig(target_modules="all-linear", **fields), "default")
        return {
            name: (module.r["default"], module.scaling["default"])
            for name, module in peft.model.named_modules()
            if hasattr(module, "lora_A")
        }

    return scales


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 16, "lora_alpha": 32},
        {"r": 3, "lora_alpha": 7.5, "use_rslora": True},
        {"lora_alpha": -4},
        {"r": 8, "rank_pattern": {"q_proj": 4, "v_proj": 2}},
        {"r": 8, "rank_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 4}},
        {"r": 8, "rank_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 3}},
        {"r": 8, "rank_pattern": {"^model.layers.1.mlp.up_proj": 5, "up_proj": 2}, "use_rslora": True},
        {"r": 8, "alpha_pattern": {"self_attn.k_proj": 1, "down_proj": 3.25}},
        {
            "r": 6,
            "lora_alpha": 10,
            "use_rslora": True,
            "rank_pattern": {"o_proj": 5, "layers.1.mlp.gate_proj": 7},
            "alpha_pattern": {"mlp.gate_proj": 0.5, "o_proj": 100, "proj": 3, "no_such": 9},
        },
        {"rank_pattern": {"q.proj": 2, "..proj": 5}},
    ],
)
def test_rank_and_scaling_are_pefts(
    peft_scales: Callable[..., dict[str, tuple[int, float]]], fields: dict[str, object]
) -> None:
    expected = peft_scales(**fields)
    config = parse(**fields)
    assert len(expected) == 14
    assert expected == {path: tuple(config.module_scale(path)) for path in expected}


@pytest.fixture(scope="module")
def scales_of_layers() -> Callable[..., dict[str, tuple[int, float]]]:
    """As ``peft_scales``, of a few bare layers: fast enough for many configs."""
    import torch
    from peft import LoraConfig as PeftLoraConfig
    from peft.tuners.lora import LoraModel

    def scales(**fields: object) -> dict[str, tuple[int, float]]:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # keys that match nothing
            layers = torch.nn.Module()
            for path in LAYERS:
                *folders, name = path.split(".")
                place = layers
                for folder in folders:
                    if not hasattr(place, folder):
                        place.add_module(folder, torch.nn.Module())
                    place = place.get_submodule(folder)
                place.add_module(name, torch.nn.Linear(1, 1))
            targets = sorted({path.rpartition(".")[2] for path in LAYERS})
            peft = LoraModel(layers, PeftLoraConfig(target_modules=targets, **fields), "default")
        found = {path: peft.model.get_submodule(path) for path in LAYERS}
        return {path: (layer.r["default"], layer.scaling["default"]) for path, layer in found.items()}

    return scales


@hazards.examples(150)
def test_a_generated_config_is_resolved_as_peft_does_or_refused_for_what_is_wrong_with_it(
    scales_of_layers: Callable[..., dict[str, tuple[int, float]]], num_examples: int
) -> None:
    num_accepted = 0

    def check(served: dict[str, object], idle: dict[str, object], active: tuple[str, object] | None) -> None:
        nonlocal num_accepted
        fields = {**served, **idle, **dict([active] if active else [])}
        raw = json.dumps({"peft_type": "LORA", **fields}).encode()
        if active:
            refusal = refusal_of(raw)
            assert (refusal.param or "").startswith(active[0])
            return
        num_accepted += 1
        config = parse_lora_config(raw)
        expected = scales_of_layers(**served)
        assert expected == {path: tuple(config.module_scale(path)) for path in expected}

    hazards.generate("B", num_examples, check, SERVED_FIELDS, IDLE_FIELDS, st.none() | ACTIVE_FIELDS)
    assert num_accepted > num_examples / 4
