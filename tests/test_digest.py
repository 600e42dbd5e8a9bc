from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tunefleet.adapters_store.digest import adapter_digest, file_sha256, served_config
from tunefleet.adapters_store.lora_config import parse_lora_config

WEIGHTS = hashlib.sha256(b"weights").hexdigest()

# (adapter_config.json, its served config, digest with WEIGHTS): what another implementation must get, too.
VECTORS = [
    (
        b'{"peft_type": "LORA", "target_modules": ["q_proj"]}',
        '{"alpha_pattern":[],"lora_alpha":8,"peft_type":"LORA","r":8,"rank_pattern":[],"use_rslora":false}',
        "a40d8c167f372c6978b6c726d476926d709dda1a7ba45fb15f0a7ac3adba31a9",
    ),
    (
        b'{"r": 16, "peft_type": "LORA", "lora_alpha": 0.1, "use_rslora": true, "lora_dropout": 0.5}',
        '{"alpha_pattern":[],"lora_alpha":0.1,"peft_type":"LORA","r":16,"rank_pattern":[],"use_rslora":true}',
        "f39bf7af5fb28f7c5565988421b582abe9442715d9d19ff9fb799820863e34dd",
    ),
    (
        b'{"peft_type": "LORA", "lora_alpha": 16.0, "rank_pattern": {"v_proj": 4,'
        b' "^model.layers.0.mlp.up_proj": 2},'
        b' "alpha_pattern": {"q_proj": 1e22, "k_proj": -2.5}}',
        '{"alpha_pattern":[["q_proj",1e+22],["k_proj",-2.5]],"lora_alpha":16,"peft_type":"LORA","r":8,'
        '"rank_pattern":[["v_proj",4],["^model.layers.0.mlp.up_proj",2]],"use_rslora":false}',
        "c2d5282d94b379c8d8458014bf66b460e211edbe3fed71725c2ee3d51db4e13c",
    ),
]


@pytest.mark.parametrize(("raw", "served", "digest"), VECTORS)
def test_digests_are_those_of_the_test_vectors(raw: bytes, served: str, digest: str) -> None:
    config = parse_lora_config(raw)
    assert served == served_config(config).decode()
    assert digest == hashlib.sha256(served.encode() + b"\0" + WEIGHTS.encode()).hexdigest()
    assert digest == adapter_digest(config, WEIGHTS)


def digest_of(raw: bytes) -> str:
    return adapter_digest(parse_lora_config(raw), WEIGHTS)


def test_what_does_not_change_answers_does_not_change_the_digest() -> None:
    plain = digest_of(b'{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    assert plain == digest_of(
        b'{"lora_alpha": 16.0, "bias": "none", "task_type": "CAUSAL_LM", "inference_mode": true,'
        b' "base_model_name_or_path": "x/y", "rank_pattern": {}, "use_dora": false, "peft_type": "LORA"}'
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 4},
        {"lora_alpha": 17},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"rank_pattern": {"attn.q_proj": 3, "q_proj": 2}},  # the first match wins
        {"rank_pattern": {}, "alpha_pattern": {"q_proj": 2, "attn.q_proj": 3}},
    ],
)
def test_what_changes_answers_changes_the_digest(changes: dict[str, object]) -> None:
    one = {"peft_type": "LORA", "lora_alpha": 16, "rank_pattern": {"q_proj": 2, "attn.q_proj": 3}}
    assert digest_of(json.dumps(one).encode()) != digest_of(json.dumps({**one, **changes}).encode())


def test_a_files_sha256_is_lowercase_hex(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"weights")
    assert file_sha256(tmp_path / "file") == WEIGHTS
