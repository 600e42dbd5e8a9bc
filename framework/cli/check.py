"""``tunefleet adapters check``: validation as an upload does it, here."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from tunefleet import config
from tunefleet.cli.output import note
from tunefleet.errors import AdapterInvalid
from tunefleet.fleet import needs_serve_extra
from tunefleet.uploads import adapter_folder

if TYPE_CHECKING:
    from tunefleet.adapters_store.validation import CheckedAdapter


async def check_offline(path: Path, base_model: str | None, max_rank: int | None) -> CheckedAdapter:
    """Raises AdapterInvalid with what is wrong. The base is prepared first if it never was.

    What is None is as the environment says, or the default.
    """
    with needs_serve_extra():
        from tunefleet.adapters_store.validation import check_adapter
        from tunefleet.runtime.base import locate_base, read_manifest
    options = config.resolve(flags={"base_model": base_model, "max_adapter_rank": max_rank})
    base_dir = await asyncio.to_thread(locate_base, options, progress=note)
    manifest = read_manifest(base_dir)
    async with adapter_folder(path, options) as folder:
        checked = check_adapter(folder, manifest, max_rank=options.max_adapter_rank)
    if checked.size_bytes > options.max_upload_bytes:
        raise AdapterInvalid(
            f"the adapter is larger than {options.max_upload_bytes} bytes, the server's max_upload_bytes",
            code="adapter_too_large",
        )
    return checked
