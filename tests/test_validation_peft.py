"""Whatever PEFT saves is served with exactly the numbers of PEFT itself, or refused by name.

Adapters are made and saved by PEFT; what they do is asked from PEFT, which loads the same folder onto a fresh
base.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import adapter_factory as factory
from adapter_factory import adapter_files, make_manifest
from lora_kit import matrices_in
from malformed.archives import tar_of
from tunefleet.adapters_store.archives import unpack
from tunefleet.adapters_store.prepare import prepare_adapter
from tunefleet.adapters_store.slot_layout import SlotLayout
from tunefleet.adapters_store.validation import CheckedAdapter, check_adapter
from tunefleet.core import CONFIG_FILE, Manifest
from tunefleet.errors import AdapterInvalid
from tunefleet.runtime.prepare import _linears

Base = Callable[[], PreTrainedModel]
Changes = dict[str, torch.Tensor]


def llama(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": factory.HIDDEN, "intermediate_size": factory.INTERMEDIATE}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=factory.NUM_LAYERS, **sizes, **heads, **changes)
    return LlamaForCausalLM(config)


def llama_with_biases() -> PreTrainedModel:
    return llama(attention_bias=True)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 12, **fields})


def manifest_of(base: Base) -> Manifest:
    return make_manifest(linears=_linears(base()))


def trained(config: PeftConfig, base: Base = llama, adapter_name: str = "default") -> PeftModel:
    """Every trained tensor is another one than at the start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT corrects by itself
        model = get_peft_model(base(), config, adapter_name=adapter_name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def saved(folder: Path, config: PeftConfig, base: Base = llama, **how: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # embedding layers are saved, too
        trained(config, base).save_pretrained(folder, **how)
    return folder


def edit(folder: Path, **fields: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def changes_by_peft(folder: Path, base: Base) -> Changes:
    """What the adapter adds to each module's weight, ``[in, out]``, by PEFT's own loader and layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(base(), str(folder))
    changes = {}
    for path, layer in loaded.base_model.model.named_modules():
        if getattr(layer, "lora_A", None):
            change = layer.get_delta_weight("default").detach()
            changes[path] = change if layer.fan_in_fan_out else change.T
    return changes


def changes_by_us(
    folder: Path, manifest: Manifest, out: Path
) -> tuple[CheckedAdapter, dict[str, torch.Tensor]]:
    checked = check_adapter(folder, manifest, max_rank=64)
    layout = SlotLayout(manifest.linears)
    prepare_adapter(folder, checked, out, layout=layout, dtype="float32")
    return checked, {path: a.T @ b for path, (a, b) in matrices_in(out, manifest.linears).items()}


def assert_pefts_numbers(folder: Path, base: Base, out: Path) -> CheckedAdapter:
    checked, ours = changes_by_us(folder, manifest_of(base), out)
    theirs = changes_by_peft(folder, base)
    assert theirs.keys() == ours.keys()
    for path, change in theirs.items():
        torch.testing.assert_close(ours[path], change, rtol=1e-6, atol=1e-7)
        assert change.abs().max() > 1e-3
    return checked


SERVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "no task": {"task_type": None},
    "causal language model": {"task_type": "CAUSAL_LM"},
    "dropout": {"lora_dropout": 0.5},
    "alpha negative": {"lora_alpha": -12},
    "alpha with a fraction": {"lora_alpha": 0.3},
    "rank 1": {"r": 1},
    "rsLoRA": {"use_rslora": True, "r": 3},
    "rank by module": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "mlp.up_proj": 5}},
    "rank by layer, the first match wins": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "model.layers.0.self_attn.q_proj": 3, "q_proj": 2}
    },
    "pattern keys are whole names": {"rank_pattern": {"proj": 7, "attn.q_proj": 6, "_proj": 5}},
    "alpha by module": {"alpha_pattern": {"q_proj": 1, "layers.0.self_attn.v_proj": 100}},
    "rsLoRA and both patterns": {
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"^model.layers.1.mlp.up_proj": 5, "up_proj": 2, "o_proj": 3},
        "alpha_pattern": {"up_proj": 7, "down_proj": 0.5},
    },
    "all-linear": {"target_modules": "all-linear"},
    "target_modules is a regex": {"target_modules": r".*\.layers\.1\..*(gate|up)_proj"},
    "target_modules is one module": {"target_modules": ["layers.0.self_attn.k_proj"]},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "o_proj"]},
    "exclude_modules is a regex": {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "bias all, of a base without biases": {"bias": "all"},
    "bias lora_only, of a base without biases": {"bias": "lora_only"},
    "init gaussian": {"init_lora_weights": "gaussian"},
    "init orthogonal": {"init_lora_weights": "orthogonal"},
    "init eva": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "init mica": {"init_lora_weights": "mica"},
    "layers_to_transform out of range": {"layers_to_transform": [1, 999]},
}


@pytest.mark.parametrize("fields", SERVED.values(), ids=SERVED)
def test_it_is_served_with_pefts_numbers(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert_pefts_numbers(saved(tmp_path / "adapter", lora(**fields)), llama, tmp_path / "out")


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_layers_that_store_their_weights_transposed_are_served(tmp_path: Path, fan_in_fan_out: bool) -> None:
    """PEFT sets fan_in_fan_out by itself on such layers, but not in every config in the world."""
    config = lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, rank_pattern={"c_fc": 2})
    folder = saved(tmp_path / "adapter", config, gpt2)
    expected = changes_by_peft(folder, gpt2)
    edit(folder, fan_in_fan_out=fan_in_fan_out)
    _, ours = changes_by_us(folder, manifest_of(gpt2), tmp_path / "out")
    assert len(ours) == 8
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


def test_an_adapter_of_another_name_is_served_from_its_own_folder(tmp_path: Path) -> None:
    """PEFT saves it in a folder of that name, below the one that was asked for."""
    trained(lora(), adapter_name="alice").save_pretrained(tmp_path / "out")
    assert_pefts_numbers(tmp_path / "out" / "alice", llama, tmp_path / "prepared")
    files = adapter_files(tmp_path / "out" / "alice")
    (tmp_path / "archive").write_bytes(tar_of({f"alice/{name}": files[name] for name in files}))
    (tmp_path / "unpacked").mkdir()
    unpack(tmp_path / "archive", tmp_path / "unpacked", 10**6)
    assert files == adapter_files(tmp_path / "unpacked")


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_that_moves_the_base_is_served_once_converted(
    tmp_path: Path, init: str, changes: dict[str, Any]
) -> None:
    config = lora(init_lora_weights=init, lora_alpha=4, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(llama(), config)
        model.peft_config["default"].init_lora_weights = True  # else PEFT loads it by initialising it again
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = init
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += torch.randn(parameter.shape) * 0.1
        model.save_pretrained(
            tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    checked = assert_pefts_numbers(tmp_path / "out", llama, tmp_path / "prepared")
    assert checked.rank == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_served_as_it_is_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    trained(lora()).to(dtype).save_pretrained(tmp_path / "adapter")
    assert_pefts_numbers(tmp_path / "adapter", llama, tmp_path / "out")


def test_the_smallest_config_has_pefts_defaults(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", lora(r=8))
    (folder / CONFIG_FILE).write_text('{"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}')
    assert_pefts_numbers(folder, llama, tmp_path / "out")


def test_unsloths_additions_change_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", lora())
    mapping = {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.x",
        "unsloth_fixed": True,
    }
    edit(folder, auto_mapping=mapping, base_model_name_or_path="unsloth/tiny-unsloth-bnb-4bit")
    checked = assert_pefts_numbers(folder, llama, tmp_path / "out")
    assert ["quantised copy" in warning for warning in checked.warnings] == [True]


def block_diagonal() -> peft.BdLoraConfig:
    return peft.BdLoraConfig(nblocks=2, target_modules_bd_a=["q_proj"], match_strict=False)


# Kind -> how PEFT makes it, and what the refusal names.
REFUSED: dict[str, tuple[Callable[[], PeftConfig], str]] = {
    "lora_bias": (lambda: lora(lora_bias=True), "lora_bias"),
    "DoRA": (lambda: lora(use_dora=True), "use_dora"),
    "modules_to_save": (lambda: lora(modules_to_save=["lm_head"]), "modules_to_save"),
    "embeddings": (lambda: lora(target_modules=["embed_tokens", "q_proj"]), "embed_tokens"),
    "trainable tokens": (lambda: lora(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "target_parameters": (
        lambda: lora(target_modules=[], target_parameters=["mlp.gate_proj.weight"]),
        "target_parameters",
    ),
    "layer_replication": (lambda: lora(layer_replication=[(0, 2), (1, 2)]), "layer_replication"),
    "aLoRA": (
        lambda: lora(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
        "alora_invocation_tokens",
    ),
    "QALoRA": (lambda: lora(use_qalora=True), "use_qalora"),
    "BD-LoRA": (
        lambda: lora(
            use_bdlora=peft.BdLoraConfig(nblocks=2, target_modules_bd_a=["q_proj"], match_strict=False)
        ),
        "use_bdlora",
    ),
    "KaSA": (lambda: lora(kasa_config=peft.KasaConfig()), "kasa_config"),
    "VeLoRA": (lambda: lora(velora_config=peft.VeloraConfig()), "velora_config"),
    "MonteCLoRA": (lambda: lora(monteclora_config=peft.MontecloraConfig()), "monteclora_config"),
    "PiSSA": (lambda: lora(init_lora_weights="pissa"), "init_lora_weights"),
    "OLoRA": (lambda: lora(init_lora_weights="olora"), "init_lora_weights"),
    "rank_pattern is a regex": (lambda: lora(rank_pattern={r".*\.q_proj": 2}), "rank_pattern"),
    "alpha_pattern is a regex": (lambda: lora(alpha_pattern={"layers.(0|1).*": 2}), "alpha_pattern"),
    "VeRA": (lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]), "peft_type"),
    "IA3": (lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type"),
    "LoHa": (lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"]), "peft_type"),
    "LoKr": (lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"]), "peft_type"),
    "AdaLoRA": (
        lambda: peft.AdaLoraConfig(init_r=4, target_modules=["q_proj"], total_step=10),
        "peft_type",
    ),
    "OFT": (lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]), "peft_type"),
    "prefix tuning": (
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        "peft_type",
    ),
    "prompt tuning": (
        lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        "peft_type",
    ),
}


def refusal_of(folder: Path, base: Base = llama) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as refusal:
        check_adapter(folder, manifest_of(base), max_rank=64)
    return refusal.value


@pytest.mark.parametrize(("config", "named"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_by_name_saying_what_to_do(
    tmp_path: Path, config: Callable[[], PeftConfig], named: str
) -> None:
    refusal = refusal_of(saved(tmp_path, config()))
    assert named in (refusal.param or "")
    assert named in refusal.message
    assert any(word in refusal.message for word in ("train", "save", "target_modules", "are served"))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_refused_where_the_base_has_them(tmp_path: Path, bias: str) -> None:
    refusal = refusal_of(saved(tmp_path, lora(bias=bias), llama_with_biases), llama_with_biases)
    assert refusal.code == "unknown_module"
    assert (refusal.param or "").endswith(".bias")


# Kinds that PEFT needs another library, data or a cluster for: as it writes them.
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arrow_config", {"top_k": 3}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "pissa_niter_16"),
    ],
)
def test_what_peft_makes_with_other_tools_is_refused_by_name(
    tmp_path: Path, field: str, value: object
) -> None:
    saved(tmp_path, lora())
    edit(tmp_path, **{field: value})
    refusal = refusal_of(tmp_path)
    assert (refusal.code, refusal.param) == ("unsupported_feature", field)


def test_patterns_that_peft_saves_in_another_order_are_refused_as_peft_does(tmp_path: Path) -> None:
    """PEFT sorts a config's keys when it saves it, while the first match wins: here that is another key."""
    saved(tmp_path, lora(rank_pattern={"q_proj": 2, "layers.0.self_attn.q_proj": 3}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        changes_by_peft(tmp_path, llama)
    assert refusal_of(tmp_path).code == "shape_mismatch"


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path, lora(), safe_serialization=False)
    assert refusal_of(tmp_path).code == "pickle_refused"


def test_an_adapter_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    get_peft_model(llama(), lora()).save_pretrained(tmp_path)
    assert refusal_of(tmp_path).code == "adapter_has_no_effect"
