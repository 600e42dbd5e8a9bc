from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunefleet.adapters_store.s3_url import PARAMETERS, S3Location, parse_s3_url
from tunefleet.errors import ConfigError


def test_a_bucket_alone_is_aws_in_the_usual_region() -> None:
    assert parse_s3_url("s3://models", {}) == S3Location(
        bucket="models",
        endpoint="https://s3.us-east-1.amazonaws.com",
        public_endpoint="https://s3.us-east-1.amazonaws.com",
        region="us-east-1",
    )


def test_everything_can_be_said(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    url = (
        "s3://my.models-2/team/a?endpoint=http://minio:9000&public_endpoint=https://s3.example.com&region=eu-west-1"
        f"&ca={tmp_path}/ca.pem&sse=aws:kms:arn:aws:kms:eu:1:key/k&style=virtual"
    )
    location = parse_s3_url(url, {"AWS_REGION": "ap-south-1"})
    assert location == S3Location(
        bucket="my.models-2",
        prefix="team/a/",
        endpoint="http://minio:9000",
        public_endpoint="https://s3.example.com",
        region="eu-west-1",
        ca=f"{tmp_path}/ca.pem",
        sse="aws:kms:arn:aws:kms:eu:1:key/k",
        style="virtual",
    )
    assert location.kms_key == "arn:aws:kms:eu:1:key/k"


@pytest.mark.parametrize(
    ("environment", "region"),
    [
        ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-1"),
        ({"AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-2"),
        ({"AWS_REGION": ""}, "us-east-1"),
    ],
)
def test_the_region_is_the_environments(environment: dict[str, str], region: str) -> None:
    assert parse_s3_url("s3://models", environment).region == region


@pytest.mark.parametrize("url", ["s3://models", "s3://models/", "s3://models//"])
def test_slashes_alone_are_no_prefix(url: str) -> None:
    assert parse_s3_url(url, {}).prefix == ""


@pytest.mark.parametrize("url", ["s3://models/a/b", "s3://models/a/b/", "s3://models/a%2Fb"])
def test_a_prefix_ends_in_one_slash(url: str) -> None:
    assert parse_s3_url(url, {}).prefix == "a/b/"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "names no bucket"),
        ("s3:///prefix", "names no bucket"),
        ("s3:models", "names no bucket"),
        ("s3://AB", "bucket 'AB': 3 to 63"),
        ("s3://ab", "3 to 63"),
        ("s3://-models", "3 to 63"),
        ("s3://models-", "3 to 63"),
        ("s3://mod..els", "3 to 63"),
        ("s3://models:9000", "3 to 63"),
        ("s3://10.0.0.1", "3 to 63"),
        ("s3://" + "a" * 64, "3 to 63"),
        ("s3://models/../x", "prefix that isn't"),
        ("s3://models/a//b", "prefix that isn't"),
        ("s3://models/a%20b", "prefix that isn't"),
        ("s3://models/%00", "prefix that isn't"),
        ("s3://models/" + "a" * 301, "prefix that isn't"),
        ("s3://models#part", "has a '#'"),
        ("s3://models?endpont=http://x", "unknown parameter 'endpont'; known are endpoint,"),
        ("s3://models?region=", "must give region one value"),
        ("s3://models?region=a&region=b", "must give region one value"),
        ("s3://models?region=a/b", "no region's name"),
        ("s3://models?endpoint=minio:9000", "endpoint as http://host:port"),
        ("s3://models?endpoint=ftp://minio", "endpoint as http://host:port"),
        ("s3://models?endpoint=http://minio/path", "endpoint as http://host:port"),
        ("s3://models?endpoint=http://minio:port", "endpoint as http://host:port"),
        ("s3://models?endpoint=http://u:geheim@minio", "endpoint as http://host:port"),
        ("s3://models?public_endpoint=minio", "public_endpoint as http://host:port"),
        ("s3://models?ca=/no/such/file", "no such file"),
        ("s3://models?sse=aws:kms", "AES256 or aws:kms:<key>"),
        ("s3://models?sse=aes256", "AES256 or aws:kms:<key>"),
        ("s3://models?style=auto", "path or virtual"),
        ("s3://key:geheim@models", "must not hold credentials"),
    ],
)
def test_what_isnt_understood_is_refused_with_what_to_write(url: str, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_s3_url(url, {})
    assert said in refusal.value.message
    assert "s3://bucket/prefix?endpoint=http://host:9000" in refusal.value.message
    assert refusal.value.param == "store_url"
    assert "geheim" not in refusal.value.message


@given(
    st.text(alphabet="ab-.9/%?&=#@:[]\\ \0ä", max_size=40),
    st.sampled_from(["", "?", *(f"?{name}=" for name in PARAMETERS)]),
    st.text(alphabet="ab-.9/%?&=#@:[]\\ \0ä", max_size=40),
)
def test_any_url_is_a_place_or_a_config_error(place: str, parameter: str, value: str) -> None:
    try:
        location = parse_s3_url(f"s3://{place}{parameter}{value}", {})
    except ConfigError:
        return
    assert 3 <= len(location.bucket) <= 63
    assert not location.prefix or location.prefix.endswith("/")
    assert location.endpoint.startswith(("http://", "https://"))
