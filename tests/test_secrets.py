"""Keys, passwords and signatures are in no log, no error and no answer, whatever goes wrong."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from adapter_factory import adapter_files
from cli_kit import run_main
from postgres_server import PostgresServer
from router_kit import Kit, api, ask, code, serving, upload
from s3_servers import S3Server, free_ports
from tunefleet import Client
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.objects import open_store
from tunefleet.auth import admin_key
from tunefleet.config import Options, resolve
from tunefleet.core import WEIGHTS_FILE
from tunefleet.errors import ConfigError, StoreError, TunefleetError
from tunefleet.http.app import create_app

SECRET = "hunter2"  # in whatever is wrong here
URL = "/v1/users/alice/adapter"


@pytest.fixture(autouse=True)
def logs(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """All that we log, tracebacks too, has no secret in it after a test."""
    with caplog.at_level(logging.DEBUG, logger="tunefleet"):
        yield caplog
    ours = [record for record in caplog.records if record.name.startswith("tunefleet")]
    check(*(caplog.handler.format(record) for record in ours))


def check(*texts: str) -> None:
    for text in texts:
        assert SECRET not in text
        assert "X-Amz-Signature" not in text


def refusal(call: Callable[[], object], kind: type[TunefleetError]) -> TunefleetError:
    """An error that has no secret in it, in its causes or in what a traceback shows of them."""
    with pytest.raises(kind) as caught:
        call()
    check(*traceback.format_exception(caught.value), caught.value.message, repr(caught.value))
    return caught.value


@pytest.fixture(params=["juicefs", "seaweedfs"])
def server(request: pytest.FixtureRequest) -> S3Server:
    """Each real S3 server."""
    server: S3Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def nowhere() -> str:
    """An address of this machine that nobody listens at."""
    return f"127.0.0.1:{free_ports(1)[0]}"


def refused(response: httpx2.Response) -> tuple[int, str]:
    check(response.text, str(response.headers))
    return code(response)


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hunter2@bucket",
        "s3://key:hunter2",
        "s3://key:hunter2/bucket",
        "s3://key%3Ahunter2%40bucket",
        "s3://key:hunter2\N{ACCOUNT OF}@bucket",  # urlsplit quotes what it refuses
        "s3://[key:hunter2@bucket]",
        "s3://bucket?secret_key=hunter2",
        "s3://bucket?endpoint=http://key:hunter2@host",
        "s3://bucket?endpoint=http://key:hunter2\N{ACCOUNT OF}@host",
        "s3://bucket#hunter2",
        "S3://hunter2@bucket",
        "a://hunter2@bucket",
        "hunter2@bucket",
        "file://key:hunter2@host/path",
        "file://key:hunter2\N{ACCOUNT OF}@host/path",
    ],
)
def test_a_store_url_with_a_secret_is_refused_without_it(url: str) -> None:
    environ = {"TUNEFLEET_STORE_URL": url, "TUNEFLEET_DATABASE_URL": "sqlite:////nowhere/catalog.db"}
    error = refusal(lambda: open_store(resolve(environ=environ).store_url), ConfigError)
    assert (error.param, error.message.startswith("store_url")) == ("store_url", True)
    assert refusal(lambda: resolve(environ={"TUNEFLEET_STORE_URL": url}), ConfigError).message


@pytest.mark.parametrize(
    "url",
    [
        "mysql://app:hunter2@host/db",
        "postgresql://app:hunter2@host:port/db",
        "postgresql://app:x@hunter2@host/db",
        "postgresql://app:hunter2@host",
        "app:hunter2@host/db",
    ],
)
def test_a_database_url_that_is_wrong_is_refused_without_its_password(url: str) -> None:
    error = refusal(lambda: Catalog(url), ConfigError)
    assert (error.param, error.message.startswith("database_url")) == ("database_url", True)


def test_a_database_that_is_not_there_is_told_without_its_password(tmp_path: Path, nowhere: str) -> None:
    for query in ("", "?sslmode=require", "?password=hunter2", "?application_name=hunter2"):
        url = f"postgresql://app:hunter2@{nowhere}/db{query}"
        error = refusal(lambda url=url: Catalog(url), StoreError)  # type: ignore[misc]
        assert error.code == "catalog_unavailable"


@pytest.mark.postgres
def test_a_password_that_is_wrong_is_told_without_it(postgres: PostgresServer) -> None:
    host = f"127.0.0.1:{postgres.port}"
    for whose, database in (("locked", "postgres"), ("app", "none"), ("nobody", "postgres")):
        url = f"postgresql://{whose}:hunter2@{host}/{database}"
        error = refusal(lambda url=url: Catalog(url), StoreError)  # type: ignore[misc]
        assert error.code == "catalog_unavailable"


@pytest.mark.postgres
def test_a_database_that_goes_away_is_told_to_clients_without_its_password(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    url = postgres.fresh()
    kit = Kit(tmp_path, database_url=url.replace("app@", "app:hunter2@"))
    with api(kit) as client:
        assert upload(client, kit.adapter()).status_code == 201
        postgres.drop(url)
        answers = [
            upload(client, kit.adapter(1)),
            client.get(URL),
            client.post(f"{URL}/uploads"),
            client.delete("/v1/users/alice"),
            ask(client, "alice"),
        ]
    assert {(503, "catalog_unavailable")} == {refused(answer) for answer in answers}


def test_options_show_no_password(tmp_path: Path) -> None:
    options = Options(
        store_url=tmp_path.as_uri(), database_url="postgresql://app:hunter2@host/db", cache_dir=str(tmp_path)
    )
    check(repr(options), str(options))


@pytest.mark.s3
def test_a_secret_key_that_is_wrong_is_told_without_it(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_url = server.url(server.make_bucket())
    kit = Kit(tmp_path, store_url=store_url, database_url=database(tmp_path))
    with api(kit) as client:
        assert upload(client, kit.adapter()).status_code == 201
        upload_id = client.post(f"{URL}/uploads").json()["upload_id"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store = open_store(store_url)
    assert refusal(lambda: list(store.list("")), StoreError).code == "store_denied"
    presigned = store.presign_put("staging/default/u1/file", expires_s=60)
    assert presigned is not None
    assert (SECRET in presigned.url, httpx2.put(presigned.url, content=b"x").status_code) == (False, 403)
    store.close()
    with api(kit) as client:
        answers = [
            upload(client, kit.adapter(1)),
            client.post(f"{URL}/uploads"),
            client.post(f"{URL}/uploads/{upload_id}/complete"),
            client.get(f"{URL}/versions/1/files/{WEIGHTS_FILE}"),
        ]
    assert {(503, "store_denied")} == {refused(answer) for answer in answers}


def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/catalog.db"


def test_a_store_that_is_not_there_is_told_without_keys_and_signatures(
    tmp_path: Path, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    kit = Kit(tmp_path, store_url=f"s3://bucket?endpoint=http://{nowhere}", database_url=database(tmp_path))
    with api(kit) as client:
        answers = [upload(client, kit.adapter()), client.post(f"{URL}/uploads")]
    assert {(503, "store_unavailable")} == {refused(answer) for answer in answers}


@pytest.mark.s3
def test_signatures_are_in_the_answer_that_gives_them_and_nowhere_else(
    tmp_path: Path, server: S3Server, logs: pytest.LogCaptureFixture
) -> None:
    store_url = server.url(server.make_bucket())
    kit = Kit(tmp_path, store_url=store_url, database_url=database(tmp_path), access_log=True)
    with api(kit) as client:
        ticket = client.post(f"{URL}/uploads").json()
        files = ticket["files"]
        signatures = [file["url"].partition("X-Amz-Signature=")[2] for file in files.values()]
        assert [len(signature) for signature in signatures] == [64, 64]
        for name, content in adapter_files(kit.adapter()).items():
            assert httpx2.put(files[name]["url"], content=content).status_code == 200
        complete = f"{URL}/uploads/{ticket['upload_id']}/complete"
        answers = [client.post(complete), client.get(URL), client.get("/v1/users/alice")]
        begun = client.post(f"{URL}/uploads").json()
        answers += [
            client.post(f"{URL}/uploads/{begun['upload_id']}/complete"),
            client.delete("/v1/users/alice"),
        ]
    check(*(answer.text for answer in answers))
    assert [answer.status_code for answer in answers] == [201, 200, 200, 422, 200]
    lines = [record.getMessage() for record in logs.records if record.name == "tunefleet.access"]
    assert len(lines) == 7


def test_keys_of_callers_are_in_no_log_and_no_answer(tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    kit = Kit(tmp_path, access_log=True)
    kit.dispatcher.error = RuntimeError("a bug of ours")
    right = {"authorization": "Bearer hunter2-right"}
    with api(kit, admin_key("hunter2-right")) as client:
        answers = [
            client.get("/v1/models", headers={"authorization": wrong})
            for wrong in ("Bearer hunter2", "Basic hunter2", "hunter2", "Bearer hunter2-right x")
        ]
        answers += [client.get("/v1/models?api_key=hunter2"), client.get("/v1/models", auth=("app", SECRET))]
        assert {(401, "unauthenticated")} == {refused(answer) for answer in answers}
        assert refused(ask(client, headers=right)) == (500, "internal_error")
        assert refused(client.get("/v1/nothing?key=hunter2", headers=right)) == (404, "not_found")
        assert refused(client.get(URL, headers=right)) == (404, "adapter_not_found")
    failures = [record for record in logs.records if record.exc_info]
    assert ["a bug of ours" in logs.handler.format(record) for record in failures] == [True]


def test_a_clients_key_and_its_urls_password_are_in_no_error(tmp_path: Path, nowhere: str) -> None:
    with serving(create_app(Kit(tmp_path).fleet(), admin_key("right"), with_lifespan=True)) as url:
        for key in ("hunter2", "hunter2\n"):
            with Client(url, key) as client:
                check(repr(client))
                refusal(lambda: client.adapters.live("alice"), TunefleetError)
        with Client(url, "right\n") as client:
            assert client.users() == []
    with Client(f"http://app:hunter2@{nowhere}") as client:
        refusal(lambda: client.adapters.live("alice"), TunefleetError)
    for key in ("hunter2\nx", "hunter2ü", "hunter2\0"):
        refusal(lambda key=key: Client(nowhere, key), ConfigError)  # type: ignore[misc]


def test_the_command_says_what_is_wrong_without_secrets(
    nowhere: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNEFLEET_URL", f"http://app:hunter2@{nowhere}")
    for key in ("hunter2ü", "hunter2"):
        monkeypatch.setenv("TUNEFLEET_API_KEY", key)
        assert run_main(monkeypatch, "status") == 1
    assert run_main(monkeypatch, "serve", "--store-url", "file://key:hunter2@host/path") == 1
    out, err = capsys.readouterr()
    check(out, err)
    assert [line.partition(" ")[0] for line in err.splitlines()] == ["tunefleet:"] * 3
