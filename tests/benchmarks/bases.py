"""The base that is measured: the quickstart one, or for a quick run a tiny random one."""

from __future__ import annotations

from pathlib import Path

from tests.base_kit import VOCAB, save_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from tunefleet.config import resolve
from tunefleet.core import Manifest
from tunefleet.runtime.base import locate_base, read_manifest
from tunefleet.runtime.model import save_model
from tunefleet.runtime.prepare import describe, write_manifest

_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def quickstart_base() -> Path:
    return locate_base(resolve(), progress=print)


def tiny_base(folder: Path) -> Path:
    """A prepared Llama of two layers."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    manifest = describe(model, name="tiny", weights_sha256="0" * 64, dtype="float32")
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_model(model, folder)
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    write_manifest(manifest, folder)
    return folder


def manifest_of(base_dir: Path) -> Manifest:
    return read_manifest(base_dir)
