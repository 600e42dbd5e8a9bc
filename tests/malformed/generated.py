"""Strategies that make what strangers may send: near misses of right files, and files from a grammar."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
import zipfile
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from adapter_factory import file_bytes, raw_tensor, with_header
from malformed.configs import NOT_SERVED, WRONG_FIELDS
from tunefleet.core import CONFIG_FILE, WEIGHTS_FILE

BYTES = st.sampled_from(
    [
        b"",
        b"0",
        b"-",
        b"9",
        b'"',
        b"{",
        b"}",
        b"[",
        b",",
        b":",
        b"e",
        b".",
        b" ",
        b"\xff",
        b"\0",
        b"F32",
        b"\\u0000",
    ]
)

ORDINARY = file_bytes(
    {
        "a": raw_tensor(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "b": raw_tensor(np.full((4,), 2, np.float32), "BF16"),
        "c": raw_tensor(np.full((1, 2), 3, np.float32), "F16"),
    }
)


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@st.composite
def flipped(draw: st.DrawFn, ordinary: bytes) -> bytes:
    """Bits flipped, bytes replaced, cut out or put in; mostly with a header length that fits again."""
    raw = bytearray(ordinary)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        raw[start : start + draw(st.integers(0, 3))] = draw(BYTES | st.binary(max_size=3))
    if draw(st.booleans()) and len(raw) > 16:
        raw[:8] = max(raw.rfind(b"}") + 1 - 8, 0).to_bytes(8, "little")
    return bytes(raw)


@st.composite
def cut_or_spliced(draw: st.DrawFn, ordinary: bytes) -> bytes:
    """The beginning of a file, and perhaps the end of it or of nothing, from another place."""
    beginning = ordinary[: draw(st.integers(0, len(ordinary)))]
    return beginning + draw(st.sampled_from([b"", ordinary[draw(st.integers(0, len(ordinary))) :], bytes(9)]))


ODD = st.sampled_from([None, True, -1, 0, 1.5, 2**31, 2**63, 2**70, "", "F32", [], {}, [0], [True, 2], [[2]]])
NAMES = st.sampled_from(
    [
        "a",
        "b",
        "__metadata__",
        "",
        "../x",
        "a\0",
        "a b",
        "\u00e4",
        "n" * 600,
        "base_model.model.x.lora_A.weight",
    ]
)
SIZES = st.lists(st.integers(0, 4) | st.sampled_from([-1, 2**31, 2**62, 2**64]), max_size=4)
DTYPES = st.sampled_from(["F32", "F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "f32", ""])


@st.composite
def edited(draw: st.DrawFn, ordinary: bytes) -> bytes:
    """The header says something else of one tensor, or of the file; or says the same in another order."""
    header, content = header_of(ordinary)
    name = draw(st.sampled_from(sorted(header)))
    field = draw(
        st.sampled_from(["dtype", "shape", "data_offsets", "name", "order", "more", "less", "entry"])
    )
    if field == "order":
        header = {key: header[key] for key in draw(st.permutations(sorted(header)))}
    elif field == "name":
        header[draw(NAMES)] = header.pop(name)
    elif field == "more":
        header[draw(NAMES)] = draw(
            ODD | st.fixed_dictionaries({"dtype": DTYPES, "shape": SIZES, "data_offsets": SIZES})
        )
    elif field == "less":
        del header[name]
    elif field == "entry":
        header[name] = draw(ODD)
    else:
        header[name][field] = draw(ODD | (DTYPES if field == "dtype" else SIZES))
    return with_header(header, content)


@st.composite
def laid_out(draw: st.DrawFn) -> bytes:
    """Small tensors from a grammar, one after the other; sometimes with a hole, an overlap or a wrong end."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(NAMES | st.text("abc", min_size=1, max_size=3), unique=True, max_size=4)):
        dtype = draw(DTYPES)
        shape = draw(st.lists(st.integers(1, 3), max_size=3))
        size = int(np.prod(shape, initial=1)) * {"F32": 4, "F64": 8, "I64": 8, "BOOL": 1}.get(dtype, 2)
        start = position + draw(st.sampled_from([0, 0, 0, 0, 0, -1, 4]))
        position = start + size + draw(st.sampled_from([0, 0, 0, 0, 0, 1]))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, position]}
    content = draw(st.binary(min_size=max(position, 0), max_size=max(position, 0)))
    return with_header(header, content + draw(st.sampled_from([b"", b"", b"", b"x"])))


SAFETENSORS = st.one_of(
    flipped(ORDINARY), cut_or_spliced(ORDINARY), edited(ORDINARY), laid_out(), st.binary(max_size=64)
)


class Member(NamedTuple):
    """Of an archive; ``kind`` is a tar's type, and for a zip what the member says of itself."""

    name: str
    content: bytes
    kind: bytes = tarfile.REGTYPE

    @property
    def is_plain(self) -> bool:
        return self.kind in (tarfile.REGTYPE, tarfile.DIRTYPE)


FILE_NAMES = (CONFIG_FILE, WEIGHTS_FILE)
FOLDERS = ("", "./", "a/", "b/", "a/b/", "../", "/", "a/../", "..\\", "C:/", "/tmp/", "a//", "\u00e4/", "~/")
OTHERS = (
    "README.md",
    "adapter_model.bin",
    "._adapter_config.json",
    "..",
    ".",
    "x\\y",
    "adapter_con\uff46ig.json",
)
MEMBER_NAMES = st.builds(str.__add__, st.sampled_from(FOLDERS), st.sampled_from(FILE_NAMES + OTHERS))
KINDS = (
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.FIFOTYPE,
    tarfile.GNUTYPE_SPARSE,
)
CONTENTS = st.binary(max_size=40) | st.sampled_from([b"x" * 700, b"\0" * 5000, b"\0" * 80_000])
PAIRS = st.sampled_from(FOLDERS[:4]).map(
    lambda folder: [Member(f"{folder}{name}", name[8:12].encode()) for name in FILE_NAMES]
)


@st.composite
def member_lists(draw: st.DrawFn) -> list[Member]:
    """Often an adapter, with others around it; often enough only one of its files, or both in odd places."""
    members = draw(PAIRS | st.just([]))
    regular = st.just(tarfile.REGTYPE)
    plain = st.builds(Member, MEMBER_NAMES, CONTENTS, regular)
    special = st.builds(Member, MEMBER_NAMES, st.just(b""), st.sampled_from(KINDS))
    harmless = st.builds(Member, st.sampled_from(["README.md", "a/x.json", "b/y"]), CONTENTS, regular)
    others = draw(st.lists(harmless | plain | special, max_size=3) | st.just([]))
    return draw(st.permutations(members + others))


def tar_with(members: list[Member], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.linkname, info.size = member.kind, "/etc/passwd", len(member.content)
            archive.addfile(info, io.BytesIO(member.content))
    return out.getvalue()


def zip_with(members: list[Member], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    modes = {tarfile.DIRTYPE: 0o040755, tarfile.REGTYPE: 0o100644, tarfile.FIFOTYPE: 0o010644}
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", compression) as archive:
        warnings.simplefilter("ignore")  # zipfile doesn't like a name twice; nor do we
        for member in members:
            info = zipfile.ZipInfo(member.name + "/" * (member.kind == tarfile.DIRTYPE))
            info.external_attr = modes.get(member.kind, 0o120777) << 16
            archive.writestr(info, member.content, compression)
    return out.getvalue()


@st.composite
def lying_tar(draw: st.DrawFn) -> bytes:
    """The first member's header gives another size or type, with a checksum that fits."""
    raw = bytearray(tar_with(draw(PAIRS), tarfile.USTAR_FORMAT))
    sizes = [b"%011o\0" % size for size in (0, 1, 511, 512, 513, 2048, 10**9, 8**11 - 1)]
    odd = [b"\x80" + b"\0" * 10 + b"\1", b"\xff" * 12, b"-0000000001\0", b" " * 12, b"9" * 12]
    raw[124:136] = draw(st.sampled_from(sizes + odd))
    raw[156:157] = draw(
        st.sampled_from([b"0", b"0", b"\0", b"5", b"7", b"x", b"g", b"L", b"K", b"S", b"V", b"Z"])
    )
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


@st.composite
def lying_zip(draw: st.DrawFn) -> bytes:
    """A number in the directory, in a member's own header or at the end is another one."""
    compression = draw(st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED]))
    raw = bytearray(zip_with(draw(PAIRS), compression))
    signature, last = draw(st.sampled_from([(b"PK\1\2", 46), (b"PK\3\4", 30), (b"PK\5\6", 22)]))
    start = raw.rfind(signature) + draw(st.integers(4, last - 2))
    numbers = [0, 1, 2, 99, 0xFFFF, 0xFFFFFFFF, 0x80000000, 70_000, 2**30]
    number = draw(st.sampled_from(numbers)).to_bytes(4, "little")[: draw(st.sampled_from([1, 2, 4]))]
    raw[start : start + len(number)] = number
    return bytes(raw)


UNICODE = st.text(st.characters(codec="utf-8"), max_size=30)
LAYERS = tuple(
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 10)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
)
ALPHAS = st.integers(-64, 64).filter(bool) | st.floats(0.01, 1000, allow_nan=False)
RANKS = st.integers(1, 64)


@st.composite
def pattern_keys(draw: st.DrawFn) -> str:
    """The end of a layer's path, whole names or not, sometimes anchored or with any letter for one."""
    path = draw(st.sampled_from(LAYERS))
    start = draw(st.sampled_from([0, *(place + 1 for place, letter in enumerate(path) if letter in "._")]))
    key = path[start:].replace(*draw(st.sampled_from([("_", "."), ("x", "x"), ("10", "1")])))
    return draw(st.sampled_from(["", "", "^"])) + key


SERVED_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "r": RANKS,
        "lora_alpha": ALPHAS,
        "use_rslora": st.booleans(),
        "rank_pattern": st.dictionaries(pattern_keys(), RANKS, max_size=4),
        "alpha_pattern": st.dictionaries(pattern_keys(), ALPHAS, max_size=4),
    },
)
"""Fields that decide about rank and scaling; also PEFT's own keywords."""

NOTHING = st.sampled_from([None, False, [], {}, ""])
IDLE_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "bias": st.sampled_from([None, "none", "all", "lora_only"]),
        "init_lora_weights": st.sampled_from([None, True, False, "gaussian", "eva", "orthogonal", "mica"]),
        "lora_dropout": st.floats(0, 1),
        "use_dora": st.sampled_from([None, False]),
        "modules_to_save": NOTHING,
        "layers_to_transform": st.none() | st.lists(st.integers(0, 99), max_size=3),
        "layer_replication": st.sampled_from([None, []]),
        "target_modules": st.none() | st.sampled_from(["(a+)+$", ".*", "all-linear"]) | st.lists(UNICODE),
        "base_model_name_or_path": st.none() | UNICODE,
        "runtime_config": NOTHING | st.just({"ephemeral_gpu_offload": True}),
        "a_field_of_tomorrow": NOTHING,
        "megatron_core": UNICODE,
    },
)
"""Fields without effect on answers, as they are set."""

ACTIVE_FIELDS = st.sampled_from(WRONG_FIELDS + NOT_SERVED)
