"""Does the engine compute what transformers computes for this base?

Recurrent layers, ALiBi, states outside the attention interface: such models run without an error and answer
wrongly. So every base is compared once, in fp32: packed prefill of prompts of several lengths, then ragged
decode past any attention window, against plain transformers.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tunefleet.core import Manifest, SamplingParams
from tunefleet.errors import BaseModelError
from tunefleet.messages import Submit
from tunefleet.runtime.engine import Engine, EngineLimits
from tunefleet.runtime.model import load_model

MAX_DIFF = 5e-3  # fp32 logits; right models stay below 1e-3, wrong ones are off by far more
DECODE_TOKENS = 12
MAX_PROBE_TOKENS = 2048  # a window longer than this is not crossed


def probe(model: PreTrainedModel, manifest: Manifest, prepared: Path) -> float:
    """The largest logit difference between engine and plain transformers.

    Raises:
        BaseModelError: it is larger than rounding can explain, or the engine can't run the model at all.
    """
    prompts = probe_prompts(model, manifest)
    try:
        recorder = _Recorder(load_model(prepared), manifest, max(map(len, prompts)) + DECODE_TOKENS + 1)
        answers = recorder.run(prompts)
        differences = [
            _difference(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        worst = float(torch.tensor(differences).max())  # keeps a NaN, which Python's max loses
    except BaseModelError:
        raise
    except Exception as error:  # whatever an unknown architecture raises means the same: not served
        raise BaseModelError(f"{manifest.architecture} can't be served by the engine: {error!r}") from error
    if not worst <= MAX_DIFF:
        raise BaseModelError(
            f"{manifest.architecture} can't be served: its logits differ from transformers' by {worst:.2g}"
        )
    return worst


def probe_prompts(model: PreTrainedModel, manifest: Manifest) -> list[list[int]]:
    """Random prompts: short, middling, and one that runs past the attention window if there is one."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    window = max((size for size in windows if isinstance(size, int) and size < MAX_PROBE_TOKENS), default=0)
    longest = min(max(52, window + 5), manifest.max_model_len - DECODE_TOKENS - 1)
    generator = random.Random(0)
    lengths = sorted({max(1, longest // 3), max(1, longest // 2 + 1), longest})
    return [[generator.randrange(manifest.vocab_size) for _ in range(length)] for length in lengths]


class _Recorder:
    """An engine whose logits are kept."""

    def __init__(self, model: torch.nn.Module, manifest: Manifest, max_tokens: int) -> None:
        limits = EngineLimits(max_num_seqs=8, max_model_len=max_tokens, max_batch_tokens=8192)
        self._engine = Engine(model, manifest, limits, clock=lambda: 0.0)

    def run(self, prompts: list[list[int]]) -> list[tuple[list[int], torch.Tensor]]:
        """Per prompt the greedy tokens and the logits that chose them, ``[tokens, vocab]``."""
        params = SamplingParams(max_tokens=DECODE_TOKENS, ignore_eos=True)
        tokens: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
        rows: dict[str, list[torch.Tensor]] = {request_id: [] for request_id in tokens}
        for index, prompt in enumerate(prompts):
            self._engine.add(Submit(request_id=str(index), prompt=tuple(prompt), sampling=params))
        while self._engine.scheduler:
            step = self._engine.step()
            for row, progress in enumerate(step):
                if progress.error:
                    raise BaseModelError(progress.error)
                tokens[progress.request_id] += progress.tokens
                assert self._engine.last_logits is not None
                rows[progress.request_id].append(self._engine.last_logits[row])
        return [(tokens[key], torch.stack(rows[key])) for key in tokens]


def _difference(
    reference: PreTrainedModel, prompt: list[int], answer: tuple[list[int], torch.Tensor]
) -> float:
    """One teacher-forced forward gives the reference's logits at every place of the answer."""
    tokens, logits = answer
    with torch.inference_mode():
        input_ids = torch.tensor([prompt + tokens[:-1]])
        expected = reference(input_ids=input_ids, use_cache=False).logits[0, len(prompt) - 1 :]
    return float((expected - logits).abs().max())
