"""``/metrics`` over HTTP: open to all, quick, and never in the way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from router_kit import Kit, api, ask
from tunefleet.auth import admin_key
from tunefleet.errors import ReplicaError
from tunefleet.http import metrics
from tunefleet.messages import Status
from tunefleet.runtime.fakes import FakeDispatcher


def test_it_is_prometheus_text_of_our_own_names(tmp_path: Path) -> None:
    with api(Kit(tmp_path)) as client:
        ask(client)
        response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in plain(response.text)}
    assert all(name.startswith("tunefleet_") for name in families)
    assert families["tunefleet_request_success"].samples[0].value == 1
    assert families["tunefleet_host_up"].samples[0].value == 1


def test_openmetrics_where_the_scraper_asks_for_it(tmp_path: Path) -> None:
    with api(Kit(tmp_path)) as client:
        response = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert "tunefleet_host_up" in {family.name for family in openmetrics(response.text)}


def test_what_can_not_be_read_is_counted_as_refused_too(tmp_path: Path) -> None:
    with api(Kit(tmp_path)) as client:
        assert ask(client, logit_bias={"5": 1}).status_code == 400
        assert ask(client, "nobody").status_code == 404
        told = client.get("/metrics").text
    for reason in ("unsupported_parameter", "adapter_not_found"):
        assert f'tunefleet_requests_rejected_total{{reason="{reason}"}} 1.0' in told


def test_a_scraper_needs_no_key_and_wakes_nothing(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    with api(kit, admin_key("secret")) as client:
        assert client.get("/metrics").status_code == 200
        assert kit.dispatcher.submitted == []


class _Troubled(FakeDispatcher):
    """Its host process is there, then says nothing or is lost."""

    trouble = ""

    async def status(self) -> Status:
        if self.trouble == "silent":
            await asyncio.Event().wait()
        if self.trouble == "lost":
            raise ReplicaError("the host process gave no answer; try again", code="host_unavailable")
        return await super().status()


@pytest.mark.parametrize("trouble", ["silent", "lost"])
def test_without_a_host_process_the_router_still_tells_its_own(
    tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "HOST_WAIT_S", 0.05)
    kit = Kit(tmp_path)
    kit.dispatcher = dispatcher = _Troubled(kit.dispatcher.answer)
    with api(kit) as client:
        ask(client)
        assert 'tunefleet_replicas{state="ready"} 0.0' in client.get("/metrics").text
        dispatcher.trouble = trouble
        told = client.get("/metrics").text
        dispatcher.trouble = ""
    assert "tunefleet_host_up 0.0" in told
    assert "tunefleet_replicas{" not in told
    assert 'tunefleet_request_success_total{finished_reason="stop"} 1.0' in told


def test_before_the_fleet_is_open_it_says_when_to_come_again(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    from tunefleet.auth import anyone
    from tunefleet.http.app import create_app

    client = TestClient(create_app(Kit(tmp_path).fleet(), anyone))
    for path in ("/metrics", "/readyz"):
        response = client.get(path)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
