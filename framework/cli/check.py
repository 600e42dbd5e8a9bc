"""``tunefleet adapters check``: validation as an upload does it, here."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from tunefleet import config
from tunefleet.cli.output import note
from tunefleet.fleet import needs_serve_extra
from tunefleet.uploads import adapter_folder

if TYPE_CHECKING:
    from tunefleet.adapters_store.validation import CheckedAdapter


async def check_offline(path: Path, base_model: str, max_rank: int) -> CheckedAdapter:
    """Raises AdapterInvalid with what is wrong. The base is prepared first if it never was."""
    with needs_serve_extra():
        from tunefleet.adapters_store.validation import check_adapter
        from tunefleet.runtime.base import locate_base, read_manifest
    options = config.resolve(flags={"base_model": base_model})
    base_dir = await asyncio.to_thread(locate_base, options, progress=note)
    manifest = read_manifest(base_dir)
    async with adapter_folder(path, options) as folder:
        return check_adapter(folder, manifest, max_rank=max_rank)
