"""What an upload must be to be served: checked completely before anything is stored or reaches a device."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from tunefleet.adapters_store.base_names import base_warning
from tunefleet.adapters_store.digest import adapter_digest, file_sha256
from tunefleet.adapters_store.lora_config import MAX_CONFIG_BYTES, LoraConfig, matches, parse_lora_config
from tunefleet.adapters_store.strict_json import shown
from tunefleet.adapters_store.tensors import Float32Array, TensorEntry, TensorFile, read_tensors
from tunefleet.core import CONFIG_FILE, WEIGHTS_FILE, LinearSpec, Manifest
from tunefleet.errors import AdapterInvalid

PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl")

MAX_WEIGHT_CHANGE = 1e6
"""Bound on max|A|, on max|scaling * B| and on rank times both, hence on each entry of the weight's change.

Trained adapters stay below 1e2; far beyond, activations overflow, which in a shared batch is not only the
owner's problem."""

LOST_BELOW = {
    "float32": float(np.finfo(np.float32).tiny),
    "bfloat16": float(np.finfo(np.float32).tiny),
    "float16": float(np.nextafter(2.0**-25, 1.0)),  # half of its smallest number is rounded to zero
}
"""Folded values that the served dtype rounds, or a device flushes, to zero."""

LARGEST = {"float32": MAX_WEIGHT_CHANGE, "bfloat16": MAX_WEIGHT_CHANGE, "float16": 65504.0}
"""Folded values that the served dtype can hold, and that an adapter may have."""

MAX_WARNINGS = 20

_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<matrix>[AB])(?:\.default)?\.weight")
_PREFIX = "base_model.model."

_NO_EMBEDDINGS = "adapters on embeddings are not served: leave them out of target_modules"
_NO_LORA_BIAS = "biases on lora_B are not served: train with lora_bias=False"

# Part of a tensor's name -> what it means that it is there; the first that fits is told.
_HINTS = {
    "lora_embedding_": _NO_EMBEDDINGS,
    "trainable_tokens": "trained token embeddings are not served: train without trainable_token_indices",
    "embed_tokens": _NO_EMBEDDINGS,
    "lm_head": "adapters on the output head are not served: leave it out of target_modules",
    "wte": _NO_EMBEDDINGS,
    "lora_magnitude_vector": "DoRA is not served: train with use_dora=False",
    "lora_B.bias": _NO_LORA_BIAS,
    "lora_bias": _NO_LORA_BIAS,
    "lora_E": "AdaLoRA is not served: train with LoraConfig",
    "modules_to_save": "whole trained modules are not served: train without modules_to_save",
    ".bias": "trained biases are not served: train with bias='none'",
    "base_layer": "the base's own weights can't be replaced: save the lora_A and lora_B tensors only",
    "lora_": "it is not <module>.lora_A.weight or <module>.lora_B.weight",
}


class ModulePlan(msgspec.Struct, frozen=True):
    """How one module's tensors become its part of a slot."""

    rank: int
    scaling: float
    in_features: int
    out_features: int
    dtype: str  # as stored: F32, F16 or BF16
    lora_a: str  # tensor names in the file
    lora_b: str


class CheckedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An upload that can be served, and everything the catalog needs to know of it."""

    digest: str
    config_sha256: str  # of the file's bytes
    weights_sha256: str
    size_bytes: int  # both files
    rank: int  # largest over its modules
    target_modules: tuple[str, ...]  # short names, e.g. "q_proj"
    modules: dict[str, ModulePlan]  # by module path
    warnings: tuple[str, ...] = ()


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Which adapter a folder holds, before anything is known of its tensors."""

    config: LoraConfig
    digest: str
    config_sha256: str
    weights_sha256: str
    size_bytes: int


def check_adapter(folder: Path, manifest: Manifest, *, max_rank: int) -> CheckedAdapter:
    """Checks adapter_config.json and adapter_model.safetensors in ``folder``.

    Raises:
        AdapterInvalid: the first problem found; ``param`` names the field, tensor or file.
    """
    return check_tensors(folder, identify(folder), manifest, max_rank=max_rank)


def identify(folder: Path) -> Identity:
    """Parses the config and hashes the weights; raises AdapterInvalid for a config that can't be served."""
    check_present(folder)
    with (folder / CONFIG_FILE).open("rb") as file:
        raw_config = file.read(MAX_CONFIG_BYTES + 1)
    config = parse_lora_config(raw_config)
    weights = folder / WEIGHTS_FILE
    weights_sha256 = file_sha256(weights)
    return Identity(
        config=config,
        digest=adapter_digest(config, weights_sha256),
        config_sha256=hashlib.sha256(raw_config).hexdigest(),
        weights_sha256=weights_sha256,
        size_bytes=len(raw_config) + weights.stat().st_size,
    )


def check_tensors(
    folder: Path, identity: Identity, manifest: Manifest, *, max_rank: int, is_known: bool = False
) -> CheckedAdapter:
    """Checks the weights of an identified folder against its config and the base.

    Args:
        is_known: these very bytes were checked when they were uploaded; their values aren't looked at again.
    """
    config = identity.config
    with read_tensors(folder / WEIGHTS_FILE) as tensors:
        modules = _plan(tensors.entries, config, manifest, max_rank)
        if not is_known:
            _check_values(tensors, modules, manifest.dtype)
    return CheckedAdapter(
        digest=identity.digest,
        config_sha256=identity.config_sha256,
        weights_sha256=identity.weights_sha256,
        size_bytes=identity.size_bytes,
        rank=max(plan.rank for plan in modules.values()),
        target_modules=tuple(sorted({path.rpartition(".")[2] for path in modules})),
        modules=modules,
        warnings=tuple(_warnings(config, manifest, modules))[:MAX_WARNINGS],
    )


def check_present(folder: Path) -> None:
    """Both files are there and are files; raises AdapterInvalid (``missing_file``, ``pickle_refused``)."""
    _check_regular(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).exists():
        pickled = next((name for name in PICKLE_FILES if (folder / name).exists()), None)
        if pickled:
            raise refused_pickle(pickled)
    _check_regular(folder / WEIGHTS_FILE)


def refused_pickle(name: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"{name} is a pickle, which can run code, so it is never read: "
        f"save with safe_serialization=True to get {WEIGHTS_FILE}",
        code="pickle_refused",
        param=name,
    )


def _check_regular(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise AdapterInvalid(
            f"{path.name} is missing: an adapter is {CONFIG_FILE} and {WEIGHTS_FILE}",
            code="missing_file",
            param=path.name,
        ) from error
    if not stat.S_ISREG(mode):
        raise AdapterInvalid(f"{path.name} is not a regular file", code="missing_file", param=path.name)


def _plan(
    entries: dict[str, TensorEntry], config: LoraConfig, manifest: Manifest, max_rank: int
) -> dict[str, ModulePlan]:
    """Each module's rank, scaling and tensors, from names and shapes alone."""
    if not entries:
        raise AdapterInvalid(
            f"{WEIGHTS_FILE} holds no tensors: it would answer like the base",
            code="adapter_has_no_effect",
            param=WEIGHTS_FILE,
        )
    pairs: dict[str, dict[str, TensorEntry]] = {}
    for entry in entries.values():
        path, matrix = _module_of(entry.name, manifest)
        pair = pairs.setdefault(path, {})
        if matrix in pair:
            raise _refused("duplicate_tensor", entry.name, f"is lora_{matrix} of {path} a second time")
        pair[matrix] = entry
    return {
        path: _module_plan(path, pair, config, manifest, max_rank) for path, pair in sorted(pairs.items())
    }


def _module_of(name: str, manifest: Manifest) -> tuple[str, str]:
    """Module path and "A" or "B". PEFT's prefix may be missing; ``default`` may name the adapter."""
    match = _KEY.fullmatch(name)
    if match:
        path = match["path"].removeprefix(_PREFIX)
        if path in manifest.linears:
            return path, match["matrix"]
    hint = next(
        (hint for part, hint in _HINTS.items() if part in name and (part != "lora_" or not match)), None
    )
    problem = f"targets no linear layer of {manifest.name}" + (f": {hint}" if hint else "")
    raise _refused("unknown_module", name, problem)


def _module_plan(
    path: str, pair: dict[str, TensorEntry], config: LoraConfig, manifest: Manifest, max_rank: int
) -> ModulePlan:
    for present, missing in (("A", "B"), ("B", "A")):
        if missing not in pair:
            raise _refused("missing_tensor", pair[present].name, f"has no lora_{missing} beside it")
    spec = manifest.linears[path]
    if config.fan_in_fan_out and not spec.fan_in_fan_out:
        raise AdapterInvalid(
            f"{CONFIG_FILE}: fan_in_fan_out is true, but {path} is an ordinary linear layer",
            code="unsupported_feature",
            param="fan_in_fan_out",
        )
    rank, scaling = config.module_scale(path)
    if rank > max_rank:
        raise _refused("rank_too_large", pair["A"].name, f"has rank {rank}, the limit here is {max_rank}")
    _check_shapes(pair["A"], pair["B"], spec, rank)
    return ModulePlan(
        rank=rank,
        scaling=scaling,
        in_features=spec.in_features,
        out_features=spec.out_features,
        dtype=pair["A"].dtype,
        lora_a=pair["A"].name,
        lora_b=pair["B"].name,
    )


def _check_shapes(lora_a: TensorEntry, lora_b: TensorEntry, spec: LinearSpec, rank: int) -> None:
    for entry, expected in ((lora_a, (rank, spec.in_features)), (lora_b, (spec.out_features, rank))):
        if entry.shape != expected:
            raise _refused(
                "shape_mismatch",
                entry.name,
                f"has shape {list(entry.shape)}; this base and the config's rank need {list(expected)}",
            )


def _check_values(tensors: TensorFile, modules: dict[str, ModulePlan], dtype: str) -> None:
    """Finite, in range, and not without effect once folded and cast to the base's dtype."""
    has_effect = False
    for plan in modules.values():
        _check_scaling(plan)
        peaks_a = _peaks(tensors, plan.lora_a, by_row=True)
        peaks_b = _peaks(tensors, plan.lora_b, by_row=False) * abs(plan.scaling)
        _check_range(plan, float(peaks_a.max()), float(peaks_b.max()), dtype)
        kept = (peaks_a >= LOST_BELOW[dtype]) & (peaks_b >= LOST_BELOW[dtype])
        has_effect = has_effect or bool(kept.any())
    if not has_effect:
        raise AdapterInvalid(
            f"in every module lora_A or lora_B is zero, as given or in {dtype}: "
            "it would answer like the base; was it saved before training?",
            code="adapter_has_no_effect",
            param=WEIGHTS_FILE,
        )


def _check_scaling(plan: ModulePlan) -> None:
    """Folding multiplies in float32: there infinity times zero would be NaN."""
    if not abs(plan.scaling) <= float(np.finfo(np.float32).max):
        raise _refused("out_of_range", plan.lora_b, f"has the scaling {plan.scaling:.4g}: check lora_alpha")


def _check_range(plan: ModulePlan, max_a: float, max_b: float, dtype: str) -> None:
    if not max(max_a, max_b, plan.rank * max_a * max_b) <= MAX_WEIGHT_CHANGE:
        raise _refused(
            "out_of_range",
            plan.lora_b,
            f"with scaling {plan.scaling:.4g} may change weights by more than {MAX_WEIGHT_CHANGE:g}: "
            "lora_alpha or the weights are far out of range",
        )
    if max(max_a, max_b) > LARGEST[dtype]:
        raise _refused(
            "out_of_range",
            plan.lora_b,
            f"with scaling {plan.scaling:.4g} doesn't fit into {dtype}, in which this base is served: "
            "serve it in bfloat16 or float32",
        )


def _peaks(tensors: TensorFile, name: str, *, by_row: bool) -> npt.NDArray[np.float64]:
    """Largest magnitude of each row or each column of a matrix; one pass that also finds NaN and infinity."""
    rows: list[Float32Array] = []
    for first, block in tensors.rows(name):
        peaks = np.abs(block).max(axis=1 if by_row else 0)
        if not np.isfinite(peaks).all():
            row, column = np.argwhere(~np.isfinite(block))[0]
            raise _refused("not_finite", name, f"holds {block[row, column]} in row {first + row}")
        rows.append(peaks)
    found = np.concatenate(rows) if by_row else np.max(rows, axis=0)
    return found.astype(np.float64)


def _warnings(config: LoraConfig, manifest: Manifest, modules: dict[str, ModulePlan]) -> Iterable[str]:
    about_base = base_warning(config.base_model_name_or_path, manifest.name)
    if about_base:
        yield about_base
    if config.task_type not in (None, "CAUSAL_LM"):
        yield f"task_type is {shown(config.task_type)}; the adapter is served for text generation"
    if config.bias != "none":
        yield f"bias is {config.bias}, but the file holds no biases"
    for name, keys in (
        ("rank_pattern", [key for key, _ in config.rank_pattern]),
        ("alpha_pattern", [key for key, _ in config.alpha_pattern]),
    ):
        unused = [key for key in keys if not any(matches(key, path) for path in modules)]
        if unused:
            yield f"{name}: {shown(', '.join(unused))} names no module of this adapter"
    if isinstance(config.target_modules, tuple):
        yield from _selector_warnings(config.target_modules, modules)


def _selector_warnings(targets: tuple[str, ...], modules: dict[str, ModulePlan]) -> Iterable[str]:
    """Where list and tensors differ, by PEFT's rule for lists: the whole path, or its end on a dot."""
    names = set(targets)
    ends = {path: _dotted_ends(path) for path in modules}
    unused = names.difference(*ends.values())
    if unused:
        yield f"target_modules: there are no tensors for {shown(', '.join(sorted(unused)))}"
    extra = {path.rpartition(".")[2] for path in modules if names.isdisjoint(ends[path])}
    if extra and targets:
        names_extra = shown(", ".join(sorted(extra)))
        yield f"target_modules doesn't name {names_extra}, whose tensors are served all the same"


def _dotted_ends(path: str) -> set[str]:
    parts = path.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def _refused(code: str, tensor: str, problem: str) -> AdapterInvalid:
    return AdapterInvalid(f"{WEIGHTS_FILE}: {tensor} {problem}", code=code, param=tensor)
