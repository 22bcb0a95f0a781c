"""Shards, images and logs from elsewhere: nothing in them runs, is unpacked or takes all memory."""

import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from dinoscale.data.decoding.decode import RGB, BadSampleError
from dinoscale.data.shards.tar_headers import read_members
from dinoscale.data.sources.bad_samples import BadSample, BadSampleLog
from dinoscale.data.sources.source import open_source
from dinoscale.errors import DataError
from dinoscale.training.hooks.metrics import Metrics
from tests.e2e.hostile import Call, dinoscale, settings


@pytest.fixture
def fired(tmp_path: Path) -> Path:
    return tmp_path / "fired"


DAMAGED_LINES = (
    b"[1]",
    b"1",
    b"null",
    b'{"step": null, "path": null}',
    b'{"step": [], "path": []}',
    b'{"step": ' + b"9" * 9999 + b', "path": 1}',
    b'{"step": 1' + b"0" * 999 + b', "path": 1}',
    b"[" * 100000,
    b"\xff\xfe\x00\x80",
    b'{"step": 3, "path": "\\ud800"',
    b"\0" * 2**20,
    b"x" * 2**24,
)


def test_any_line_in_the_logs_of_a_run_is_survived(tmp_path: Path) -> None:
    good = b'{"step": 1, "path": "a.jpg"}'
    for name in ("metrics.jsonl", "bad_samples.jsonl"):
        (tmp_path / name).write_bytes(b"\n".join([good, *DAMAGED_LINES]))
    metrics = Metrics(
        tmp_path, active=True, start_step=2, total_steps=3, wandb_project=None, config={}
    )
    metrics.write(3, {"loss": 0.0})
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert lines == [good, b'{"step": 3, "loss": 0.0}']
    listed = BadSampleLog(tmp_path / "bad_samples.jsonl")
    before = (tmp_path / "bad_samples.jsonl").read_bytes()
    listed.add([BadSample("a.jpg", "", 0, 1, 0), BadSample("b.jpg", "", 0, 1, 0)])
    after = (tmp_path / "bad_samples.jsonl").read_bytes()
    assert after.startswith(before)
    assert json.loads(after.splitlines()[-1])["path"] == "b.jpg"
    assert b"a.jpg" not in after[len(before) :]


def _jpeg(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def _png_bomb(side: int) -> bytes:
    """A PNG that says it is side x side pixels, in 60 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(x) (w) file\nshowpage\n"


@pytest.mark.parametrize("side", [100_000, 20_000, 2**31 - 1])
def test_decompression_bomb_is_a_bad_sample(side: int) -> None:
    with pytest.raises(BadSampleError, match=r"DecompressionBomb|not an image"):
        RGB.open(_png_bomb(side), "bomb.png").pixels()


def _false_ghostscript(folder: Path, fired: Path) -> str:
    """A PATH on which `gs` is a program that leaves a mark."""
    program = folder / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{fired}'\n")
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


def test_postscript_is_run_by_pillow_and_not_by_us(
    tmp_path: Path, fired: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", _false_ghostscript(tmp_path, fired))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(BadSampleError, match="Ghostscript"):
        RGB.open(EPS, "a.jpg").pixels()
    assert not fired.exists()
    with Image.open(io.BytesIO(EPS)) as image, pytest.raises(OSError, match=r"."):
        image.load()
    assert fired.exists()


def _member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    header = info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape")
    return header + data + bytes(-len(data) % 512)


def _renamed(member: bytes, name: bytes) -> bytes:
    return _summed(name.ljust(100, b"\0")[:100] + member[100:])


def _sized(size: bytes) -> bytes:
    header = _member("a.jpg")
    return _summed(header[:124] + size.ljust(12, b"\0")[:12] + header[136:])


def _summed(header: bytes) -> bytes:
    """The same with its right checksum."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank[:512]) + blank[156:]


def _pax(record: bytes) -> bytes:
    return _member("pax", record, tarfile.XHDTYPE) + _member("a.jpg", _jpeg())


SIZES = {
    "octal": _sized(b"77777777777"),
    "binary": _sized(b"\x80" + b"\x7f" * 11),
    "binary, all ones": _sized(b"\x80" + b"\xff" * 11),
    "below zero": _sized(b"-1000"),
    "back to itself": _sized(b"-1"),
    "back by one": _member("b.jpg", _jpeg()) + _sized(b"-2000"),
    "binary below zero": _sized(b"\xff" * 12),
    "underscores": _sized(b"1_0"),
    "pax": _pax(b"31 size=99999999999999999999999\n"),
    "pax, 5000 digits": _pax(b"5011 size=" + b"9" * 5000 + b"\n"),
    "pax, length of 5000 digits": _pax(b"9" * 5000 + b" size=1\n"),
    "pax, below zero": _pax(b"12 size=-99\n"),
}


@pytest.mark.parametrize("name", SIZES)
def test_size_that_no_file_has_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(SIZES[name] + bytes(1024))
    with pytest.raises(DataError, match=r"a\.tar is damaged"):
        assert len(list(islice(read_members(str(path)), 100))) < 100


def _hostile_members(outside: Path) -> list[bytes]:
    """Members that a careless unpacker would write, link or open outside its folder."""
    image, away = _jpeg(), str(outside / "secret.jpg")
    links = [
        _member(name, b"", kind, target)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)
        for name, target in (("l.jpg", away), ("r.jpg", "../outside/secret.jpg"), ("d", "/"))
    ]
    devices = [
        _member("n.jpg", b"", kind) for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    ]
    odd = (b"nul\0.jpg", b"line\n{}.jpg", b"\x1b[2J.jpg", b"\xff\xfe.jpg", b"$(touch fired).jpg")
    return [
        *links,
        *devices,
        _member("../escape.jpg", image),
        _member("a/../../../outside/escape.jpg", image),
        _member(str(outside / "absolute.jpg"), image),
        _member("d/through_the_link.jpg", image),
        _member("../outside/", b"", tarfile.DIRTYPE),
        *(_renamed(_member("x.jpg", image), name) for name in odd),
        *(_member(f"{i}.jpg", _jpeg(i)) for i in range(20)),
        _member("bomb.png", _png_bomb(100_000)),
        _member("program.jpg", EPS),
        _member("pickle.jpg", pickle.dumps(Call(open, str(outside / "fired"), "w"))),
        _member("0.cls", pickle.dumps(Call(open, str(outside / "fired"), "w"))[:60]),
    ]


def _tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_names_of_members_are_only_names(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(_hostile_members(outside)) + bytes(1024))
    before = _tree(tmp_path)
    source = open_source(str(path))
    bad = []
    for index in range(len(source)):
        try:
            assert source.picture(index).pixels().shape == (20, 20, 3)
        except BadSampleError as error:  # noqa: PERF203  # three of thirty
            bad.append(error.path.rpartition("::")[2])
    assert bad == ["bomb.png", "program.jpg", "pickle.jpg"]
    assert source.labels is not None
    assert set(source.labels.tolist()) == {-1}
    assert _tree(tmp_path) == before


@pytest.mark.slow
def test_training_on_a_hostile_shard_writes_to_its_run_only(tmp_path: Path, fired: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(b"secret")
    path = tmp_path / "data" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(b"".join(_hostile_members(outside)) + bytes(1024))
    programs = _false_ghostscript(tmp_path, fired)
    before = _tree(tmp_path)
    run = tmp_path / "run"
    where = [f"data.train={path}", f"run_dir={run}", "data.max_bad_fraction=0.5"]
    done = dinoscale("train", "vit_t16", *settings(), *where, PATH=programs)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    listed = (run / "bad_samples.jsonl").read_text()
    for name in ("bomb.png", "program.jpg", "pickle.jpg"):
        assert name in listed
    after = _tree(tmp_path)
    assert {name for name in after if not name.startswith("run/")} == before.keys()
    assert all(after[name] == content for name, content in before.items())
