"""Tokens per second of 32 requests at once (64 tokens in, 64 out, greedy), against transformers' generate."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from tunefleet.core import AdapterRef, Manifest, SamplingParams
from tunefleet.messages import Submit
from tunefleet.runtime.engine import Engine, EngineLimits
from tunefleet.runtime.model import load_model

NUM_REQUESTS = 32
PROMPT_TOKENS = ANSWER_TOKENS = 64
RANK = 8
SLOT_BYTES = 12_000_000  # of one adapter on all layers of the quickstart base, generously


class Throughput:
    """One prepared base; engine and reference take turns."""

    def __init__(self, base_dir: Path, manifest: Manifest) -> None:
        self._base_dir = base_dir
        self._manifest = manifest
        generator = random.Random(0)
        self._prompts = [
            tuple(generator.randrange(100, manifest.vocab_size) for _ in range(PROMPT_TOKENS))
            for _ in range(NUM_REQUESTS)
        ]

    def measure(self, repeats: int) -> dict[str, float]:
        """Median tokens/s by what was run; each way runs ``repeats`` times, in turn."""
        with tempfile.TemporaryDirectory() as folder:
            adapters = [self._adapter(Path(folder), index) for index in range(NUM_REQUESTS)]
            reference = AutoModelForCausalLM.from_pretrained(
                self._base_dir, dtype=getattr(torch, self._manifest.dtype)
            ).eval()
            engine = self._engine(adapters)
            ways = {
                "transformers generate, no adapter": lambda: self._generate(reference),
                "engine, no adapter": lambda: self._run(engine, [None] * NUM_REQUESTS),
                "engine, 1 adapter": lambda: self._run(engine, [adapters[0]] * NUM_REQUESTS),
                "engine, 32 adapters": lambda: self._run(engine, list(adapters)),
            }
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for name, way in ways.items():
                way()  # not counted
                assert name
            for _ in range(repeats):
                for name, way in ways.items():
                    started = time.perf_counter()
                    way()
                    rates[name].append(NUM_REQUESTS * ANSWER_TOKENS / (time.perf_counter() - started))
        return {name: statistics.median(measured) for name, measured in rates.items()}

    @torch.inference_mode()
    def _generate(self, model: torch.nn.Module) -> None:
        model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(self._prompts),
            max_new_tokens=ANSWER_TOKENS,
            min_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )

    def _engine(self, adapters: list[AdapterRef]) -> Engine:
        limits = EngineLimits(
            max_num_seqs=NUM_REQUESTS, max_batch_tokens=4096, device_adapter_bytes=len(adapters) * SLOT_BYTES
        )
        return Engine(load_model(self._base_dir), self._manifest, limits, time.monotonic)

    def _run(self, engine: Engine, adapters: list[AdapterRef | None]) -> None:
        params = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
        for index, (prompt, adapter) in enumerate(zip(self._prompts, adapters, strict=True)):
            engine.add(Submit(request_id=str(index), prompt=prompt, sampling=params, adapter=adapter))
        for ref in engine.missing_adapters():
            engine.adapter_loaded(ref.digest, Path(ref.key), 0.0, 0.0)
        while engine.scheduler:
            for progress in engine.step():
                assert not progress.error, progress.error

    def _adapter(self, folder: Path, seed: int) -> AdapterRef:
        """A random prepared file on every linear layer."""
        generator = np.random.default_rng(seed)
        tensors = {}
        for path, spec in self._manifest.linears.items():
            tensors[f"{path}.A"] = generator.normal(0, 0.02, (RANK, spec.in_features)).astype(np.float32)
            tensors[f"{path}.B"] = generator.normal(0, 0.02, (RANK, spec.out_features)).astype(np.float32)
        file = folder / f"{seed}.safetensors"
        save_file(tensors, file)
        return AdapterRef(f"{seed:064x}", "default", str(file), "", file.stat().st_size, RANK)
