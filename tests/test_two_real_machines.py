"""Two machines with processes and tiers of their own, over one bucket and one Postgres."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

import pytest

from engine_kit import make_adapter, prepare_model, tiny_model
from lone_router import options_for
from router_kit import write_tokenizer
from s3_servers import S3Server
from tunefleet import Fleet
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.core import AdapterRef, Manifest
from tunefleet.fleet import FleetParts
from tunefleet.runtime.machine import Machine
from tunefleet.text import Tokenizer

pytestmark = [pytest.mark.anyio, pytest.mark.s3, pytest.mark.postgres, pytest.mark.slow]

TOKENS = (5, 6, 7, 8)


class Real(NamedTuple):
    """A prepared tiny base, a tokenizer and an adapter of it."""

    base: Path
    manifest: Manifest
    tokenizer: Tokenizer
    folder: Path
    ref: AdapterRef


@pytest.fixture
def real(tmp_path: Path) -> Real:
    model = tiny_model("llama")
    manifest = prepare_model(model, tmp_path / "base")
    made = make_adapter(
        model, manifest, tmp_path / "adapter", 3, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]
    )
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    return Real(tmp_path / "base", manifest, tokenizer, made.folder, made.ref)


def real_fleet(root: Path, real: Real, **shared: object) -> Fleet:
    """A whole machine below ``root``: processes, tiers and all."""
    options = options_for(root, **shared)
    parts = FleetParts(
        manifest=real.manifest,
        tokenizer=real.tokenizer,
        store=AdapterStore.open(options, real.manifest),
        dispatcher=Machine(options, real.manifest, real.base),
    )
    return Fleet.from_parts(parts, cache_dir=options.cache_dir, **shared)


def copies(root: Path, digest: str) -> list[Path]:
    """Whatever a machine's folder has of an adapter."""
    return [path for path in (root / "cache").rglob("*") if digest in path.name]


async def test_two_real_machines_answer_alike_and_both_forget(
    tmp_path: Path, juicefs: S3Server, postgres_url: str, real: Real
) -> None:
    shared = {"store_url": juicefs.url(juicefs.make_bucket()), "database_url": postgres_url}
    roots = [tmp_path / name for name in ("one", "two")]
    digest = real.ref.digest
    async with (
        real_fleet(roots[0], real, **shared) as one,
        real_fleet(roots[1], real, **shared) as two,
    ):
        await one.adapters.push("alice", real.folder)
        asked = [
            fleet.complete(user, TOKENS, temperature=0, max_tokens=16, ignore_eos=True)
            for fleet in (one, two)
            for user in ("alice", None)
        ]
        answers = await asyncio.gather(*asked)
        assert [digest, "base"] * 2 == [answer.adapter_digest for answer in answers]
        assert answers[0].text == answers[2].text != answers[1].text == answers[3].text
        assert [bool(copies(root, digest)) for root in roots] == [True, True]
        receipt = await one.delete_user("alice")
        assert receipt.status == "done"
        counts = [receipt.removed[place] for place in ("disk", "host", "device")]
        assert counts == [2, 2, 2]
        assert [copies(root, digest) for root in roots] == [[], []]
