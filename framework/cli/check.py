"""``tunefleet adapters check``: validation as an upload does it, here."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from tunefleet import config
from tunefleet.cli.output import note, print_json, print_pairs, print_table, print_warnings
from tunefleet.config import Options
from tunefleet.core import ADAPTER_FILES, CONFIG_FILE, Manifest
from tunefleet.errors import AdapterInvalid
from tunefleet.fleet import needs_serve_extra
from tunefleet.uploads import adapter_folder

if TYPE_CHECKING:
    from tunefleet.adapters_store.lora_config import LoraConfig
    from tunefleet.adapters_store.validation import CheckedAdapter


class Report(NamedTuple):
    """What was found of an adapter that would be served."""

    checked: CheckedAdapter
    config: LoraConfig
    manifest: Manifest
    max_rank: int


def print_check(path: Path, base_model: str | None, max_rank: int | None, *, as_json: bool) -> None:
    """Prints what would be served, or leaves with exit code 1 having printed why not."""
    try:
        report = asyncio.run(check_offline(path, base_model, max_rank))
    except AdapterInvalid as refusal:
        error = {"message": refusal.message, "code": refusal.code, "param": refusal.param}
        print_json({"served": False, "error": error}) if as_json else _print_refusal(refusal)
        sys.exit(1)
    if as_json:
        print_json({"served": True, "base": report.manifest.base_id, **msgspec.to_builtins(report.checked)})
    else:
        _print_report(report)


async def check_offline(path: Path, base_model: str | None, max_rank: int | None) -> Report:
    """Raises AdapterInvalid with what is wrong. The base is prepared first if it never was.

    What is None is as the environment says, or the default.
    """
    with needs_serve_extra():
        from tunefleet.runtime.base import locate_base, read_manifest
    options = config.resolve(flags={"base_model": base_model, "max_adapter_rank": max_rank})
    base_dir = await asyncio.to_thread(locate_base, options, progress=note)
    manifest = read_manifest(base_dir)
    async with adapter_folder(path, options) as folder:
        return _check_folder(folder, manifest, options)


def _check_folder(folder: Path, manifest: Manifest, options: Options) -> Report:
    from tunefleet.adapters_store.lora_config import parse_lora_config
    from tunefleet.adapters_store.validation import check_adapter

    _check_sizes(folder, options.max_upload_bytes)
    _check_place(folder)
    checked = check_adapter(folder, manifest, max_rank=options.max_adapter_rank)
    lora_config = parse_lora_config((folder / CONFIG_FILE).read_bytes())
    return Report(checked, lora_config, manifest, options.max_adapter_rank)


def _check_sizes(folder: Path, max_bytes: int) -> None:
    """Before anything is read."""
    size = sum(path.stat().st_size for name in ADAPTER_FILES if (path := folder / name).is_file())
    if size > max_bytes:
        raise AdapterInvalid(
            f"the adapter is larger than {max_bytes} bytes, the server's max_upload_bytes",
            code="adapter_too_large",
        )


def _check_place(folder: Path) -> None:
    """PEFT saves adapters that aren't called "default" in a folder of their name."""
    if not (folder / CONFIG_FILE).exists():
        below = next(iter(sorted(folder.glob(f"*/{CONFIG_FILE}"))), None)
        if below is not None:
            raise AdapterInvalid(
                f"{CONFIG_FILE} is missing in {folder}; there is one in {below.parent}: check that folder",
                code="missing_file",
                param=CONFIG_FILE,
            )


def _print_report(report: Report) -> None:
    checked = report.checked
    print_pairs(
        [
            ("verdict", f"would be served on {report.manifest.name}"),
            ("digest", checked.digest),
            ("trained on", _one_line(report.config.base_model_name_or_path or "(not said)")),
            ("size", f"{checked.size_bytes:,} bytes"),
            ("rank", f"{checked.rank}, {report.max_rank} allowed"),
            ("alpha", f"{report.config.lora_alpha:g}{', rsLoRA' if report.config.use_rslora else ''}"),
            ("modules", f"{len(checked.modules)} of the base's {len(report.manifest.linears)} linear layers"),
        ]
    )
    print()
    print_table(("module", "layers", "rank", "scaling", "in", "out", "dtype"), _rows(checked))
    print_warnings(checked.warnings)


def _rows(checked: CheckedAdapter) -> list[tuple[object, ...]]:
    """Modules of one name that are alike are one line."""
    alike = Counter(
        (path.rpartition(".")[2], plan.rank, plan.scaling, plan.in_features, plan.out_features, plan.dtype)
        for path, plan in checked.modules.items()
    )
    return [
        (name, num_layers, rank, f"{scaling:.6g}", width_in, width_out, dtype)
        for (name, rank, scaling, width_in, width_out, dtype), num_layers in sorted(alike.items())
    ]


def _print_refusal(refusal: AdapterInvalid) -> None:
    print_pairs(
        [
            ("verdict", "would be refused"),
            ("code", refusal.code),
            *([("param", _one_line(refusal.param))] if refusal.param else []),
            ("reason", _one_line(refusal.message)),
        ]
    )


def _one_line(text: str) -> str:
    """A stranger's text, without what would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
