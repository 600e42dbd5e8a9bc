"""The same load by transformers and PEFT: what people have without an engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from tests.benchmarks.bench import Bench
from transformers import AutoModelForCausalLM, PreTrainedModel

Prompts = Sequence[tuple[int, ...]]


def load_reference(bench: Bench, dtype: str | None = None) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        bench.base_dir, dtype=getattr(torch, dtype or bench.manifest.dtype)
    )
    model.eval()  # type: ignore[no-untyped-call]
    return model


class Generate:
    """``generate`` on the whole batch, without adapter."""

    def __init__(self, bench: Bench) -> None:
        self._model = load_reference(bench)

    def tokens_per_s(self, prompts: Prompts, num_tokens: int) -> float:
        return len(prompts) * num_tokens / _seconds(self._model, prompts, num_tokens)


class Peft:
    """All adapters loaded into one PeftModel."""

    def __init__(self, bench: Bench, folders: Sequence[Path]) -> None:
        self._names = [f"adapter-{index}" for index in range(len(folders))]
        self._model = PeftModel.from_pretrained(
            load_reference(bench), folders[0], adapter_name=self._names[0]
        )
        for name, folder in zip(self._names[1:], folders[1:], strict=True):
            self._model.load_adapter(folder, adapter_name=name, low_cpu_mem_usage=True)
        self._model.eval()

    def mixed_tokens_per_s(self, prompts: Prompts, num_tokens: int, shorter: tuple[int, int]) -> float:
        """``adapter_names``: each prompt its own adapter, in one batch."""
        names = [self._names[index % len(self._names)] for index in range(len(prompts))]
        few, more = (_seconds(self._model, prompts, count, adapter_names=names) for count in shorter)
        return len(prompts) * num_tokens / _extrapolated(few, more, shorter, num_tokens)

    def switching_tokens_per_s(self, prompts: Prompts, num_tokens: int, shorter: tuple[int, int]) -> float:
        """``set_adapter``, then one prompt alone; the next one's adapter, and so on."""
        few, more = (self._one_by_one(prompts, count) for count in shorter)
        return len(prompts) * num_tokens / _extrapolated(few, more, shorter, num_tokens)

    def _one_by_one(self, prompts: Prompts, num_tokens: int) -> float:
        started = time.perf_counter()
        for index, prompt in enumerate(prompts):
            self._model.set_adapter(self._names[index % len(self._names)])
            _seconds(self._model, [prompt], num_tokens)
        return time.perf_counter() - started


def _extrapolated(few: float, more: float, counts: tuple[int, int], num_tokens: int) -> float:
    """Seconds of ``num_tokens`` each, from two shorter runs: all its steps but the first cost the same."""
    per_token = (more - few) / (counts[1] - counts[0])
    return few + per_token * (num_tokens - counts[0])


@torch.inference_mode()
def _seconds(model: torch.nn.Module, prompts: Prompts, num_tokens: int, **more: object) -> float:
    input_ids = torch.tensor(prompts)
    started = time.perf_counter()
    answer = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        **more,
    )
    assert answer.shape[1] == input_ids.shape[1] + num_tokens
    return time.perf_counter() - started
