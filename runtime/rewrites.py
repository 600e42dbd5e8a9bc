"""Faster modules for a loaded base, made and swapped in one at a time, beside serving.

Nothing here delays the first token of a cold start: a model serves as it was loaded, and gets faster. Each
replacement must compute what the module computed that it replaces, or it is dropped; what isn't known stays.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import nn

from tunefleet.core import Manifest
from tunefleet.runtime.fused_attention import PROJECTIONS, FusedAttention
from tunefleet.runtime.fused_layer import FusedLayer, NotFused
from tunefleet.runtime.fused_mlp import PARTS, FusedMlp
from tunefleet.runtime.norms import OffsetRmsNorm, RmsNorm, is_rms_norm
from tunefleet.runtime.packed import NotPacked, PackedHead, PackedLinear, is_linear
from tunefleet.runtime.rewrite_check import RewriteCheck

log = logging.getLogger("tunefleet.engine")

TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 6e-2}  # of the answer's length
ATTENTION_CLASSES = {  # whose forward FusedAttention repeats
    "LlamaAttention",
    "MistralAttention",
    "Qwen2Attention",
    "Qwen3Attention",
    "Gemma2Attention",
    "Gemma3Attention",
}
LAYER_CLASSES = {  # whose forward FusedLayer repeats
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
}


class _Candidate(NamedTuple):
    """A module that may be replaced; the first replacement that computes the same is taken."""

    path: str
    makers: tuple[Callable[[nn.Module], nn.Module], ...]


class Rewrites:
    """All rewrites of one model; lives as long as its engine.

    Args:
        model: with ``LoraLayer`` around each linear layer of the manifest.
    """

    def __init__(self, model: nn.Module, manifest: Manifest, device: torch.device) -> None:
        self.num_bytes = 0  # of the copies made so far, in place of weights that nothing reads any more
        self.applied: list[str] = []  # paths
        self._model = model
        dtype: torch.dtype = getattr(torch, manifest.dtype)
        self._tolerance = TOLERANCES[dtype]
        self._check = RewriteCheck(manifest.linears, dtype, device)
        self._waiting: deque[_Candidate] | None = None  # looked for when first asked, after the first token

    @torch.inference_mode()
    def apply_next(self) -> bool:
        """Makes, checks and swaps in one replacement; False where none is left.

        Takes some milliseconds on a small model, most of them for copying weights.
        """
        if self._waiting is None:
            self._waiting = deque(_candidates(self._model))
        if not self._waiting:
            return False
        candidate = self._waiting.popleft()
        module = self._model.get_submodule(candidate.path)
        for make in candidate.makers:
            replacement = self._made(candidate.path, module, make)
            if replacement is not None:
                self._swap(candidate.path, replacement)
                return True
        if _maker(module) is not None:
            self._waiting.extendleft(reversed(list(_children(candidate.path, module))))
        return True

    def _made(self, path: str, module: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module | None:
        try:
            replacement = make(module)
            differs_by = self._check.difference(module, replacement)
        except (NotPacked, NotFused):
            return None
        except Exception as error:  # whatever a module of an unknown kind raises means the same: it stays
            log.info("%s stays as it is: %r", path, error)
            return None
        if not differs_by <= self._tolerance:
            log.info("%s stays as it is: %s differs by %.2g", path, type(replacement).__name__, differs_by)
            return None
        return replacement

    def _swap(self, path: str, replacement: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        setattr(self._model.get_submodule(owner), name, replacement)
        self.applied.append(path)
        self.num_bytes += cast(int, replacement.num_bytes)


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """Norms first, layers last: attention blocks take their norms over, layers all their parts."""
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()  # type: ignore[operator]
    yield from (_Candidate(path, (RmsNorm, OffsetRmsNorm)) for path in modules if is_rms_norm(modules[path]))
    yield from _children("", model)
    yield from (_Candidate(path, (PackedHead,)) for path in modules if modules[path] is head)
    yield from (_Candidate(path, (FusedLayer,)) for path in modules if _is_plain_layer(modules[path]))


def _children(path: str, module: nn.Module) -> Iterator[_Candidate]:
    """The largest parts of a module that may be replaced."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        make = _maker(child)
        if make is not None:
            yield _Candidate(child_path, (make,))
        else:
            yield from _children(child_path, child)


def _maker(module: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
    parts = dict(module.named_children())
    if type(module).__name__ in ATTENTION_CLASSES and all(is_linear(parts[name]) for name in PROJECTIONS):
        return FusedAttention
    if parts.keys() == PARTS and all(is_linear(parts[name]) for name in PARTS - {"act_fn"}):
        return FusedMlp
    return PackedLinear if is_linear(module) else None


def _is_plain_layer(module: nn.Module) -> bool:
    return type(module).__name__ in LAYER_CLASSES
