"""Adapters to measure with: made by PEFT, on all linear layers, and put where the disk tier finds them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.benchmarks.bench import Bench
from transformers import AutoModelForCausalLM

from tunefleet.adapters_store.file_store import FileStore
from tunefleet.adapters_store.tiers import Tiers
from tunefleet.adapters_store.validation import identify
from tunefleet.core import CONFIG_FILE, WEIGHTS_FILE, AdapterRef

MIXED_RANKS = (4, 8, 16, 32, 64)
GIB = 1 << 30


def make_adapters(bench: Bench, ranks: Sequence[int], seed: int = 0) -> list[Path]:
    """PEFT folders with random A and B in the base's dtype, one per entry of ``ranks``."""
    model = AutoModelForCausalLM.from_pretrained(bench.base_dir, dtype=getattr(torch, bench.manifest.dtype))
    folder = bench.new_folder(f"made-{seed}")
    made: dict[int, Path] = {}
    torch.manual_seed(seed)
    for rank in sorted(set(ranks)):
        peft_model = _with_adapter(model, rank)
        for index in [index for index, wanted in enumerate(ranks) if wanted == rank]:
            made[index] = folder / str(index)
            _draw(peft_model)
            peft_model.save_pretrained(str(made[index]))
        model = peft_model.unload()
    return [made[index] for index in range(len(ranks))]


def shelve(made: Sequence[Path], disk_dir: Path, count: int) -> list[AdapterRef]:
    """``count`` adapters in a disk tier's folder, as an earlier process would have left them there.

    Each has a digest of its own. Beyond those made they share weights as hard links, and differ in
    ``lora_alpha``: that spares disk, but no reading, checking, preparing or copying.
    """
    refs = []
    for number in range(count):
        source = made[number % len(made)]
        staged = disk_dir / f".{number}"
        staged.mkdir(parents=True)
        config = json.loads((source / CONFIG_FILE).read_text())
        config["lora_alpha"] = config["r"] * (1 + number // len(made) / 1000)
        (staged / CONFIG_FILE).write_text(json.dumps(config))
        os.link(source / WEIGHTS_FILE, staged / WEIGHTS_FILE)
        identity = identify(staged)
        staged.rename(disk_dir / identity.digest)
        refs.append(
            AdapterRef(
                identity.digest,
                "default",
                "on-disk-already",
                identity.weights_sha256,
                identity.size_bytes,
                config["r"],
            )
        )
    return refs


@contextlib.contextmanager
def prepared(bench: Bench, disk_dir: Path, refs: Sequence[AdapterRef]) -> Iterator[dict[str, Path]]:
    """The prepared file of each digest, out of real tiers; there until the end of the block."""
    with asyncio.Runner() as runner:
        tiers = Tiers(
            FileStore(disk_dir.with_name(f"{disk_dir.name}-store")),
            bench.manifest,
            disk_dir=disk_dir,
            host_dir=disk_dir.with_name(f"{disk_dir.name}-host"),
            dtype=bench.manifest.dtype,  # type: ignore[arg-type]
            host_cache_bytes=8 * GIB,
            disk_cache_bytes=8 * GIB,
        )
        try:
            yield {ref.digest: runner.run(tiers.fetch(ref)).path for ref in refs}
        finally:
            runner.run(tiers.close())


def _with_adapter(model: torch.nn.Module, rank: int) -> PeftModel:
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


@torch.no_grad()
def _draw(peft_model: PeftModel) -> None:
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.02)
