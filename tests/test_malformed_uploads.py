"""Whatever is sent as an adapter: a clear refusal, nothing kept, and everybody else is served as before.

Over the real route, checks, files and catalog; only the machine is a fake.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
from hypothesis import strategies as st
from starlette.testclient import TestClient

import hazards
from adapter_factory import adapter_files, file_bytes, make_adapter, make_manifest, read_raw
from malformed.archives import BAD_NAMES, LINKS, NO_ARCHIVES, encrypted_zip, tar_of, zip_of, zip_with_a_link
from malformed.bodies import bad_multiparts, multipart, part
from malformed.configs import NOT_OBJECTS, NOT_SERVED, WRONG_FIELDS
from malformed.generated import cut_or_spliced, flipped
from malformed.safetensors import MALFORMED, REFUSED_DTYPES, one
from malformed.weights import BAD_WEIGHTS, Tensors
from router_kit import Kit, api, code, serving, staged, stored, upload
from tunefleet.auth import anyone
from tunefleet.core import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE
from tunefleet.http.app import create_app

URL = "/v1/users/alice/adapter"
LIMIT = 12_000_000


class Case(NamedTuple):
    """What is put, and its refusal: ``code`` and ``says`` are patterns."""

    request: dict[str, Any]
    code: str
    says: str
    status: int = 422


def ordinary(**how: Any) -> tuple[dict[str, bytes], Tensors]:
    """The files and tensors of an adapter that is taken, unless ``how`` makes it another one."""
    with tempfile.TemporaryDirectory() as folder:
        make_adapter(Path(folder), make_manifest(), **how)
        return adapter_files(Path(folder)), read_raw(Path(folder))


FILES, TENSORS = ordinary()
MISSING = {name: {other: FILES[other] for other in ADAPTER_FILES if other != name} for name in ADAPTER_FILES}


def parts(**changed: bytes) -> dict[str, Any]:
    """Multipart, with other bytes as ``config`` or ``weights``."""
    names = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE}
    return {"files": {**FILES, **{names[which]: content for which, content in changed.items()}}}


def with_field(name: str, value: object) -> dict[str, Any]:
    return parts(config=json.dumps({**json.loads(FILES[CONFIG_FILE]), name: value}).encode())


def body(content: object, **headers: str) -> dict[str, Any]:
    return {"content": content, "headers": {name.replace("_", "-"): text for name, text in headers.items()}}


def safetensors_cases() -> Iterator[tuple[str, Case]]:
    for name, (raw, says) in MALFORMED.items():
        yield name, Case(parts(weights=raw), "invalid_safetensors|unsupported_dtype", says)
    for dtype in REFUSED_DTYPES:
        yield f"dtype {dtype!r}", Case(parts(weights=one(dtype=dtype)), "unsupported_dtype", "t has dtype")


def config_cases() -> Iterator[tuple[str, Case]]:
    for name, raw in NOT_OBJECTS.items():
        status, refusal = (413, "adapter_too_large") if len(raw) > 65536 else (422, "invalid_adapter_config")
        yield name, Case(parts(config=raw), refusal, CONFIG_FILE, status)
    for refusal, fields in (("invalid_adapter_config", WRONG_FIELDS), ("unsupported_feature", NOT_SERVED)):
        for field, value in fields:
            shown = json.dumps(value)[:30]
            yield f"{field} = {shown}", Case(with_field(field, value), refusal, re.escape(field))
    far_out = [*((alpha, "out_of_range") for alpha in (1e38, -1e38)), (1e-300, "adapter_has_no_effect")]
    for alpha, refusal in far_out:
        yield f"lora_alpha = {alpha}", Case(with_field("lora_alpha", alpha), refusal, "lora_")
    ranks: list[tuple[str, object]] = [("r", 65), ("r", 2_000_000), ("rank_pattern", {"q_proj": 2_000_000})]
    for field, value in ranks:
        yield f"{field} = {value}", Case(with_field(field, value), "rank_too_large", "the limit here is 64")
    yield "r of another rank", Case(with_field("r", 8), "shape_mismatch", r"lora_A.weight has shape \[4, ")
    yield "fan_in_fan_out", Case(with_field("fan_in_fan_out", True), "unsupported_feature", "fan_in_fan_out")


def weights_cases() -> Iterator[tuple[str, Case]]:
    for name, (change, refusal, tensor, says) in BAD_WEIGHTS.items():
        request = parts(weights=file_bytes(change(dict(TENSORS))))
        yield name, Case(request, refusal, f"(?=.*{re.escape(tensor)}).*{says}")
    zeros = {name: tensor._replace(content=bytes(len(tensor.content))) for name, tensor in TENSORS.items()}
    yield (
        "all zero",
        Case(parts(weights=file_bytes(zeros)), "adapter_has_no_effect", "lora_A or lora_B is zero"),
    )
    yield "rank above the limit", Case({"files": ordinary(r=65)[0]}, "rank_too_large", "the limit here is 64")


def archive_cases() -> Iterator[tuple[str, Case]]:
    def refused(raw: bytes, says: str, refusal: str = "invalid_archive", status: int = 422) -> Case:
        return Case(body(raw), refusal, says, status)

    for number, name in enumerate(BAD_NAMES):
        pack = (tar_of, zip_of)[number % 2]
        yield f"{name!r} in a {pack.__name__[:3]}", refused(pack({**FILES, name: b"x"}), "leads out")
    for info, says in LINKS:
        yield f"{says} {info.name} of type {info.type!r}", refused(tar_of(FILES, info), says)
    for raw in NO_ARCHIVES:
        yield f"{raw[:12]!r} of {len(raw)}", refused(raw, "archive", "invalid_archive|missing_file")
    yield "link in a zip", refused(zip_with_a_link(FILES), "'link' is a link")
    yield "encrypted zip", refused(encrypted_zip(FILES), "encrypted")
    yield "bzip2 in a zip", refused(zip_of(FILES, zipfile.ZIP_BZIP2), "another method than deflate")
    yield "zip with a huge directory", refused(zip_of({f"{n:0>200}": b"" for n in range(5000)}), "directory")
    for pack in (tar_of, zip_of):
        kind = pack.__name__[:3]
        yield f"two adapters in a {kind}", refused(pack({**FILES, f"b/{CONFIG_FILE}": b"{}"}), "two adapters")
        yield f"twice in a {kind}", refused(pack({**FILES, f"./{CONFIG_FILE}": b"{}"}), "there twice")
        deep = {f"a/b/{name}": content for name, content in FILES.items()}
        yield f"deep in a {kind}", refused(pack(deep), "deeper than one folder")
        apart = {f"{name[8:10]}/{name}": content for name, content in FILES.items()}
        yield f"two folders in a {kind}", refused(pack(apart), "not in the same folder")
        yield (
            f"1002 members in a {kind}",
            refused(pack({**dict.fromkeys(map(str, range(1000)), b""), **FILES}), "members"),
        )
        for name, rest in MISSING.items():
            yield (
                f"no {name} in a {kind}",
                refused(pack({**rest, "x": b""}), f"holds no {name}", "missing_file"),
            )
        pickled = {**MISSING[WEIGHTS_FILE], "adapter_model.bin": b"\x80\x04."}
        yield f"pickle in a {kind}", refused(pack(pickled), "adapter_model.bin is a pickle", "pickle_refused")
        bomb = {**FILES, CONFIG_FILE: b" " * 70_000}
        yield f"config of 70 kB in a {kind}", refused(pack(bomb), "65536 bytes", "adapter_too_large", 413)
        bad = {**FILES, WEIGHTS_FILE: FILES[WEIGHTS_FILE][:-1]}
        yield f"cut weights in a {kind}", refused(pack(bad), "is cut off", "invalid_safetensors")
        cut = pack({**FILES, "noise": os.urandom(20_000)})
        yield f"cut {kind}", refused(cut[: len(cut) // 2], "cut off|comment")
    bombs = {
        "zip": zip_of({**FILES, WEIGHTS_FILE: b"\0" * (LIMIT + 1)}),
        "tar.gz": tar_of({"junk": b"\0" * (2 * LIMIT), **FILES}, mode="w:gz"),
        "gzip behind a tar": gzip.compress(tar_of(FILES) + b"\0" * (2 * LIMIT)),
    }
    for name, raw in bombs.items():
        yield f"bomb: {name}", refused(raw, f"larger than {LIMIT} bytes", "adapter_too_large", 413)
    changed = bytearray(tar_of(FILES, mode="w:gz"))
    changed[len(changed) // 3] ^= 0x10
    yield "flipped bit in a tar.gz", refused(bytes(changed), "not a whole tar")


def body_cases() -> Iterator[tuple[str, Case]]:
    for name, bad in bad_multiparts(FILES).items():
        yield name, Case(bad.request, bad.code, bad.says, 400)
    for name, rest in MISSING.items():
        yield f"no {name}", Case({"files": rest}, "missing_file", f"part '{name}' is missing")
    weights = b"\0" * (LIMIT + 1)
    large = (
        ("multipart over the limit", parts(weights=weights)),
        ("one byte over the limit", body(weights)),
        ("one byte over the limit, in chunks", body([weights[:LIMIT], weights[LIMIT:]])),
    )
    for name, request in large:
        yield name, Case(request, "body_too_large", f"{LIMIT} bytes at most", 413)
    archive = zip_of(FILES)
    headers: tuple[tuple[str, str, str, int], ...] = (
        ("Content_Digest", f"sha-256=:{'A' * 43}=:", "digest_mismatch", 400),
        ("Content_Digest", "sha-256=:A:", "invalid_digest", 400),
        ("Content_Digest", "md5=:AAAA:", "invalid_digest", 400),
        ("Content_Encoding", "gzip", "unsupported_media_type", 415),
        ("X_Adapter_Metadata", "{", "invalid_metadata", 400),
        ("X_Adapter_Metadata", json.dumps({"x": "y" * 5000}), "invalid_metadata", 400),
        ("Idempotency_Key", "a key", "invalid_idempotency_key", 400),
    )
    for header, text, refusal, status in headers:
        says = "metadata" if len(text) > 4096 else header.replace("_", "-")
        yield f"{header}: {text[:20]}", Case(body(archive, **{header: text}), refusal, says, status)


CASES = {
    f"{family}: {name}": case
    for family, cases in (
        ("safetensors", safetensors_cases()),
        ("config", config_cases()),
        ("weights", weights_cases()),
        ("archive", archive_cases()),
        ("body", body_cases()),
    )
    for name, case in cases
}


class Server(NamedTuple):
    """Bob has an adapter, Alice tries."""

    kit: Kit
    client: TestClient
    bobs: Path
    stored: list[Path]

    def check_nothing_of_alice(self) -> None:
        assert self.stored == stored(self.kit)
        assert staged(self.kit) == []
        assert code(self.client.get("/v1/users/alice")) == (404, "user_not_found")

    def check_others_are_served(self) -> None:
        assert self.client.get("/healthz").status_code == 200
        assert upload(self.client, self.bobs, "/v1/users/bob/adapter").status_code == 200


def a_server(folder: Path) -> Iterator[Server]:
    kit = Kit(folder, max_upload_bytes=LIMIT)
    with api(kit) as client:
        bobs = kit.adapter()
        assert upload(client, bobs, "/v1/users/bob/adapter").status_code == 201
        yield Server(kit, client, bobs, stored(kit))
        assert code(client.get(URL)) == (404, "adapter_not_found")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from a_server(tmp_path_factory.mktemp("malformed"))


@pytest.fixture(scope="module")
def lenient_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For uploads that may be taken."""
    yield from a_server(tmp_path_factory.mktemp("mutated"))


@pytest.mark.parametrize("case", CASES.values(), ids=[ascii(name)[1:-1] for name in CASES])
def test_it_is_refused_and_nothing_is_kept(server: Server, case: Case) -> None:
    response = server.client.put(URL, **case.request)
    status, refusal = code(response)
    message = response.json()["error"]["message"]
    assert (case.status, True) == (status, bool(re.fullmatch(case.code, refusal))), response.text
    assert re.search(case.says, message, re.DOTALL), message
    assert str(server.kit.folder) not in response.text
    server.check_nothing_of_alice()
    server.check_others_are_served()


def test_an_ordinary_adapter_in_the_same_clothes_is_taken(tmp_path: Path) -> None:
    with api(Kit(tmp_path, max_upload_bytes=LIMIT)) as client:
        for number, request in enumerate((parts(), body(tar_of(FILES)), body(zip_of(FILES)))):
            assert client.put(f"/v1/users/u{number}/adapter", **request).status_code == 201


BODY = zip_of(FILES)
FORM = multipart(*(part(name, FILES[name]) for name in FILES))


@hazards.examples(40)
def test_mutated_uploads_are_taken_or_refused_but_never_a_failure(
    lenient_server: Server, num_examples: int
) -> None:
    def check(request_: dict[str, Any], content: bytes) -> None:
        response = lenient_server.client.put("/v1/users/mallory/adapter", **{**request_, "content": content})
        assert response.status_code in {200, 201, 400, 413, 422}, response.text
        assert staged(lenient_server.kit) == []
        lenient_server.check_others_are_served()

    requests = st.sampled_from([FORM, body(BODY), body(tar_of(FILES))])
    mutated = requests.flatmap(
        lambda whole: st.tuples(st.just(whole), flipped(whole["content"]) | cut_or_spliced(whole["content"]))
    )
    hazards.generate("D", num_examples, lambda pair: check(*pair), mutated)


def http(content: bytes, *headers: str) -> bytes:
    return "\r\n".join((f"PUT {URL} HTTP/1.1", "Host: x", *headers, "", "")).encode() + content


FORM_TYPE = f"Content-Type: {FORM['headers']['content-type']}"
CHUNKED = "Transfer-Encoding: chunked"
RAW_REQUESTS = {  # with the beginning of the answer; where that is empty, the client has gone
    "length over the limit, nothing sent": (http(b"", f"Content-Length: {LIMIT + 1}"), b"413"),
    "length of 2**70": (http(b"", f"Content-Length: {2**70}"), b"4"),
    "length too short": (http(BODY, f"Content-Length: {len(BODY) - 10}"), b"4"),
    "length too short, parts": (http(FORM["content"], FORM_TYPE, "Content-Length: 500"), b"400"),
    "length negative": (http(BODY, "Content-Length: -1"), b"400"),
    "length no number": (http(BODY, "Content-Length: x"), b"400"),
    "no length": (http(BODY), b"4"),
    "chunk of no size": (http(b"zz\r\nx\r\n0\r\n\r\n", CHUNKED), b"4"),
    "chunk of 2**70": (http(b"4" + b"0" * 20 + b"\r\nx", CHUNKED), b"4"),
    "chunks that hold nothing": (http(b"0\r\n\r\n", CHUNKED), b"422"),
    "length and chunks": (http(b"0\r\n\r\n", CHUNKED, "Content-Length: 5"), b"4"),
    **{
        f"{kind} cut at {share:.0%}": (http(content[: int(len(content) * share)], *headers), b"")
        for kind, content, headers in (
            ("zip", BODY, [f"Content-Length: {len(BODY)}"]),
            ("form", FORM["content"], [FORM_TYPE, f"Content-Length: {len(FORM['content'])}"]),
            ("chunks", b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n", [CHUNKED]),
        )
        for share in (0.01, 0.5, 0.99)
    },
}


class RealServer(NamedTuple):
    kit: Kit
    url: str


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    kit = Kit(tmp_path_factory.mktemp("malformed-real"), max_upload_bytes=LIMIT)
    with serving(create_app(kit.fleet(), anyone, with_lifespan=True)) as url:
        yield RealServer(kit, url)


@pytest.mark.parametrize(("request_", "answer"), RAW_REQUESTS.values(), ids=RAW_REQUESTS)
def test_a_body_that_is_not_what_its_headers_say_keeps_nothing(
    real_server: RealServer, request_: bytes, answer: bytes
) -> None:
    port = int(real_server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request_)
        if not answer:
            connection.shutdown(socket.SHUT_WR)
        received = connection.recv(65536)
    assert received.removeprefix(b"HTTP/1.1 ").startswith(answer), received
    with httpx2.Client(base_url=real_server.url) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/v1/users").json()["data"] == []
    assert stored(real_server.kit) == []
