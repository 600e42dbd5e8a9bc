"""``tunefleet base ...``"""

from __future__ import annotations

import shutil
import time
from typing import Annotated

import typer

from tunefleet import config
from tunefleet.cli.output import note, print_json, print_pairs
from tunefleet.fleet import needs_serve_extra

app = typer.Typer(no_args_is_help=True, help="Prepare base models.")


@app.command()
def prepare(
    base_model: Annotated[str | None, typer.Argument(help="As --base-model of `tunefleet serve`.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a Hugging Face id.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    cache_dir: Annotated[str | None, typer.Option(help="As for `tunefleet serve`.")] = None,
    *,
    force: Annotated[bool, typer.Option(help="Even if it was prepared before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Fetch and convert a base model, and check that the engine computes what transformers computes."""
    with needs_serve_extra():
        from tunefleet.runtime.base import (
            find_source,
            locate_base,
            prepared_folder,
            read_manifest,
            resolve_dtype,
        )
    options = config.resolve(
        flags={"base_model": base_model, "base_revision": revision, "dtype": dtype, "cache_dir": cache_dir}
    )
    if force:
        shutil.rmtree(
            prepared_folder(options, find_source(options), resolve_dtype(options)), ignore_errors=True
        )
    started = time.monotonic()
    folder = locate_base(options, progress=note)
    manifest = read_manifest(folder)
    if as_json:
        print_json(manifest)
        return
    print_pairs(
        [
            ("base", manifest.base_id),
            ("folder", folder),
            ("dtype", manifest.dtype),
            ("layers for adapters", len(manifest.linears)),
            ("context", f"{manifest.max_model_len} tokens"),
            ("largest difference", f"{manifest.probe_max_diff:.1e} to transformers' logits in float32"),
            ("took", f"{time.monotonic() - started:.1f} s"),
        ]
    )
