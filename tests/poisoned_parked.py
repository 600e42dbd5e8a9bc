"""A parked process whose replicas one token and one adapter end: ``python -m poisoned_parked FD BASE``.

They die as by a fault in native code: no exception is raised, nothing is cleaned up.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from tunefleet.core import LinearSpec
from tunefleet.runtime import activations, parked
from tunefleet.runtime.banks import Prepared, map_prepared
from tunefleet.runtime.model import load_model

POISON = 77  # as the second token of a prompt
FATAL_RANK = 64  # of an adapter


def load_poisoned(base_dir: Path) -> nn.Module:
    model = load_model(base_dir)
    model.register_forward_pre_hook(_die_of_poison, with_kwargs=True)
    return model


def is_poisoned(kwargs: dict[str, torch.Tensor]) -> bool:
    """Whether these arguments of a forward hold the poison."""
    return bool(((kwargs["input_ids"] == POISON) & (kwargs["position_ids"] == 1)).any())


def _die_of_poison(_: object, __: object, kwargs: dict[str, torch.Tensor]) -> None:
    if is_poisoned(kwargs):
        os.kill(os.getpid(), signal.SIGSEGV)


def map_cut_short(path: Path, linears: Mapping[str, LinearSpec]) -> Prepared:
    """The fatal adapter's file loses its end once it is mapped: who reads there gets SIGBUS."""
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(path.read_bytes())
        copy.flush()
        prepared = map_prepared(Path(copy.name), linears)
        if prepared.rank_class == FATAL_RANK:
            copy.truncate(0)
    return prepared


if __name__ == "__main__":
    parked.load_model = load_poisoned  # type: ignore[attr-defined]
    activations.map_prepared = map_cut_short  # type: ignore[attr-defined]
    parked.main()
