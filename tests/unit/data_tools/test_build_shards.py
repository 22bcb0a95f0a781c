import hashlib
import io
import json
import math
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.build_shards import build_shards
from data_tools.shard_writer import parse_bytes
from dinoscale.data.sources.source import open_source
from dinoscale.errors import DataError, UnavailableError
from dinoscale.runtime.outputs import LIST_FILE
from tests.unit.data.conftest import jpeg, picture, write_tar
from tests.unit.data_tools.conftest import Storage, contents


def _build(spec: Path | str, out: Path, **changed: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "shard_bytes": 8 * 2**10,
        "max_side": None,
        "seed": 0,
        "prefix": "train",
        "workers": 1,
    }
    return build_shards(str(spec), out, **{**settings, **changed})


def _names(out: Path) -> list[str]:
    return [json.loads(line) for line in (out / "names.jsonl").read_text().splitlines()]


def test_shards_hold_the_files_and_labels_of_the_folder(
    class_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = class_folder()
    summary = _build(folder, tmp_path / "out")
    assert (summary["samples"], summary["left_out"]) == (24, 0)
    assert summary["shards"] > 3
    source = open_source(str(tmp_path / "out"))
    names = _names(tmp_path / "out")
    assert sorted(names) == sorted(str(p.relative_to(folder)) for p in folder.rglob("*.jpg"))
    for i in range(24):
        assert source.data(i) == (folder / names[i]).read_bytes()
        assert names[i].startswith(f"class {source.labels[i]}/")
    assert (tmp_path / "out" / "classes.txt").read_text() == "0\tclass 0\n1\tclass 1\n2\tclass 2\n"
    assert list(source.labels) != sorted(source.labels)


def test_manifest_counts_and_sums_are_those_of_the_files(
    class_folder: Callable[..., Path], tmp_path: Path
) -> None:
    _build(class_folder(), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sum(record["samples"] for record in manifest["shards"]) == manifest["samples"] == 24
    for record in manifest["shards"]:
        data = (tmp_path / "out" / record["name"]).read_bytes()
        assert record["bytes"] == len(data) <= 8 * 2**10 + 10240
        assert record["sha256"] == hashlib.sha256(data).hexdigest()


def test_what_a_killed_build_leaves_is_taken_for_no_image(
    class_folder: Callable[..., Path], tmp_path: Path
) -> None:
    _build(class_folder(), tmp_path / "out")
    (tmp_path / "out" / ".train-000009.tar.77.partial").write_bytes(jpeg(0))
    (tmp_path / "out" / "bad.jsonl.state").write_bytes(b"{}")
    assert len(open_source(str(tmp_path / "out"))) == 24


def test_headers_are_constant_and_keys_go_on(
    class_folder: Callable[..., Path], tmp_path: Path
) -> None:
    _build(class_folder(), tmp_path / "out")
    keys = []
    for shard in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for info in tar:
                assert (info.uid, info.gid, info.uname, info.gname, info.mtime, info.mode) == (
                    0, 0, "", "", 0, 0o444,
                )  # fmt: skip
                keys.append(info.name)
    assert keys[:4] == ["000000000.jpg", "000000000.cls", "000000001.jpg", "000000001.cls"]
    assert len(keys) == 48


@pytest.mark.parametrize("max_side", [None, 32])
def test_number_of_workers_changes_no_byte(
    class_folder: Callable[..., Path], tmp_path: Path, max_side: int | None
) -> None:
    folder = class_folder()
    for workers in (1, 3):
        _build(folder, tmp_path / str(workers), workers=workers, max_side=max_side)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_seed_changes_the_order_and_no_shuffle_keeps_that_of_the_source(
    class_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = class_folder()
    for seed in (0, 1, None):
        _build(folder, tmp_path / str(seed), seed=seed)
    orders = [_names(tmp_path / str(seed)) for seed in (0, 1, None)]
    assert orders[0] != orders[1]
    assert orders[2] == sorted(orders[0])


def test_finished_work_is_kept_and_a_damaged_shard_is_written_again(
    class_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = class_folder(), tmp_path / "out"
    _build(folder, out)
    before = contents(out)
    damaged = out / "train-000001.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1000] + bytes(1000 * [7]))
    kept = damaged.with_name("train-000000.tar").stat().st_ino
    _build(folder, out)
    assert contents(out) == before
    assert damaged.with_name("train-000000.tar").stat().st_ino == kept


@pytest.mark.parametrize("change", ["seed", "file", "foreign tar"])
def test_folder_of_another_set_is_refused(
    class_folder: Callable[..., Path], tmp_path: Path, change: str
) -> None:
    folder, out = class_folder(), tmp_path / "out"
    if change == "foreign tar":
        out.mkdir()
        write_tar(out / "other.tar", {"a.jpg": jpeg(0)})
    else:
        _build(folder, out)
    if change == "file":
        (folder / "class 0" / "new.jpg").write_bytes(jpeg(99))
    before = contents(out)
    with pytest.raises(DataError, match="other images or settings"):
        _build(folder, out, seed=1 if change == "seed" else 0)
    assert contents(out) == before


def _other_bytes_of_the_same_size(folder: Path) -> Path:
    file = folder / "class 0" / "000.v1.jpg"
    before = file.stat()
    file.write_bytes(file.read_bytes()[:-2] + b"xy")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return folder


def _copy(folder: Path) -> Path:
    return shutil.copytree(folder, folder.with_name("copy"))


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize(
    ("change", "named"),
    [(_other_bytes_of_the_same_size, "input.images.times"), (_copy, "input.images.root")],
)
def test_shards_of_other_files_of_the_same_names_and_sizes_are_not_kept(
    class_folder: Callable[..., Path],
    tmp_path: Path,
    change: Callable[[Path], Path],
    named: str,
    interrupted: bool,
) -> None:
    folder, out = class_folder(), tmp_path / "out"
    if interrupted:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("data_tools.shard_writer._manifest", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                _build(folder, out)
    else:
        _build(folder, out)
    before = contents(out)
    with pytest.raises(DataError, match=f"other images or settings.*not as it was: {named}"):
        _build(change(folder), out)
    assert contents(out) == before


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_read_error_that_passes_costs_no_image(
    class_folder: Callable[..., Path], tmp_path: Path, storage: Storage
) -> None:
    folder = class_folder()
    storage.fails = {"003.v1.jpg": 2}
    assert _build(folder, tmp_path / "out")["samples"] == 24
    assert storage.slept == [1.0, 2.0]


@pytest.mark.parametrize(("count", "refused"), [(12, True), (120, False)])
def test_files_that_cannot_be_read_are_read_again_by_the_same_command(
    class_folder: Callable[..., Path], tmp_path: Path, storage: Storage, count: int, refused: bool
) -> None:
    """One file of so many; the shards without it are kept."""
    folder, out = class_folder(count), tmp_path / "out"
    storage.fails = {"003.v1.jpg": math.inf}
    if refused:
        with pytest.raises(UnavailableError, match=r"1 of 12 files cannot be read:\n.*003") as why:
            _build(folder, out)
        assert why.value.exit_code == 69
        assert not (out / "manifest.json").exists()
    else:
        summary = _build(folder, out)
        assert (summary["samples"], summary["left_out"], summary["unavailable"]) == (119, 1, 1)
    assert sum(storage.slept) == 63
    storage.fails = {}
    summary = _build(folder, out)
    assert (summary["samples"], summary["left_out"]) == (count, 0)
    assert summary["shards_kept"] == summary["shards"] - 1
    _build(folder, tmp_path / "whole")
    again, whole = contents(out), contents(tmp_path / "whole")
    again.pop(LIST_FILE), whole.pop(LIST_FILE)  # one of them may know an earlier manifest too
    assert again == whole


def _shards_with_classes(folder: Path, listed: str, labels: str) -> Path:
    folder.mkdir(parents=True)
    members = {}
    for number, label in enumerate(labels):
        members[f"{number}.jpg"] = jpeg(len(str(folder)) * 10 + number)
        members[f"{number}.cls"] = label.encode()
    (folder / "classes.txt").write_text(listed)
    return write_tar(folder / "a.tar", members)


@pytest.mark.parametrize("named_by", ["folder", "list"])
def test_shards_of_two_numberings_are_joined_by_name(tmp_path: Path, named_by: str) -> None:
    spec = tmp_path / "in"
    shards = [
        _shards_with_classes(spec / "one", "0\tcat\n1\tdog\n", "01"),
        _shards_with_classes(spec / "two", "0\tant\n1\tcat\tkitty\n", "10"),
    ]
    if named_by == "list":
        spec = tmp_path / "keep.txt"
        spec.write_text("".join(f"{shard}::{i}.jpg\n" for shard in shards for i in (0, 1)))
    _build(spec, tmp_path / "out", seed=None)
    assert (tmp_path / "out" / "classes.txt").read_text() == "0\tant\n1\tcat\tkitty\n2\tdog\n"
    assert list(open_source(str(tmp_path / "out")).labels) == [1, 2, 1, 0]


def test_shards_that_nothing_names_are_not_mixed_with_named_ones(tmp_path: Path) -> None:
    _shards_with_classes(tmp_path / "in" / "one", "0\tcat\n", "0")
    bare = _shards_with_classes(tmp_path / "in" / "two", "", "0").with_name("classes.txt")
    bare.unlink()
    with pytest.raises(DataError, match=f"{bare} is missing"):
        _build(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("kept", ["02", "0"])
def test_a_list_without_a_class_gives_the_others_their_numbers(
    class_folder: Callable[..., Path], tmp_path: Path, kept: str
) -> None:
    folder = class_folder(6)
    listing = tmp_path / "keep.txt"
    chosen = [path for path in sorted(folder.rglob("*.jpg")) if path.parent.name[-1] in kept]
    listing.write_text("".join(f"{folder}/./{path.relative_to(folder)}\n" for path in chosen))
    _build(listing, tmp_path / "out", seed=None)
    source = open_source(str(tmp_path / "out"))
    assert [f"class {label}" for label in source.labels] == [path.parent.name for path in chosen]
    assert (tmp_path / "out" / "classes.txt").read_text().splitlines()[2] == "2\tclass 2"


def test_files_that_are_no_images_are_listed_and_left_out(
    class_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = class_folder(6)
    (folder / "class 1" / "page.jpg").write_bytes(b"<html>not found</html>")
    (folder / "class 2" / "empty.png").write_bytes(b"")
    summary = _build(folder, tmp_path / "out")
    assert (summary["samples"], summary["left_out"]) == (6, 2)
    reasons = {entry["name"]: entry["reason"] for entry in summary["left_out_files"]}
    assert reasons == {
        "class 1/page.jpg": "an HTML page, not a picture",
        "class 2/empty.png": "the file is empty",
    }
    assert len(open_source(str(tmp_path / "out"))) == 6


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="none of the 1 files"):
        _build(tmp_path / "in", tmp_path / "out")


def test_larger_pictures_are_shrunk_others_copied_and_damaged_ones_left_out(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "large.jpg").write_bytes(jpeg(0, width=400, height=300))
    (folder / "small.jpg").write_bytes(jpeg(1, width=40, height=30))
    (folder / "torn.jpg").write_bytes(jpeg(2, width=40, height=30)[:-300])
    summary = _build(folder, tmp_path / "out", max_side=100, seed=None)
    assert [entry["name"] for entry in summary["left_out_files"]] == ["torn.jpg"]
    source = open_source(str(tmp_path / "out"))
    assert source.data(1) == (folder / "small.jpg").read_bytes()
    shrunk = Image.open(io.BytesIO(source.data(0)))
    assert shrunk.size == (100, 75)
    exact = picture(0, width=400, height=300).resize((100, 75), Image.Resampling.LANCZOS)
    difference = np.asarray(shrunk, np.float64) - np.asarray(exact, np.float64)
    assert np.sqrt((difference**2).mean()) < 3


def test_extension_is_that_of_the_content(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    picture(0).save(folder / "a.jpg", "PNG")
    (folder / "b").write_bytes(jpeg(1))
    picture(2).save(folder / "c", "SGI")
    _build(folder, tmp_path / "out", seed=None)
    source = open_source(str(tmp_path / "out"))
    assert [source.path(i)[-13:] for i in range(3)] == [
        "000000000.png", "000000001.jpg", "000000002.img",
    ]  # fmt: skip


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_tar_of_class_tars_is_read_in_place(tmp_path: Path) -> None:
    inner = {
        f"n0{c}.tar": _tar({f"n0{c}_{i}.JPEG": jpeg(10 * c + i) for i in range(4)}) for c in (2, 1)
    }
    outer = write_tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    _build(outer, tmp_path / "out", seed=None)
    source = open_source(str(tmp_path / "out"))
    assert [source.data(i) for i in range(8)] == [
        jpeg(10 * c + i) for c in (2, 1) for i in range(4)
    ]
    assert list(source.labels) == [1] * 4 + [0] * 4
    assert (tmp_path / "out" / "classes.txt").read_text() == "0\tn01\n1\tn02\n"
    assert _names(tmp_path / "out")[0] == "ILSVRC2012_img_train.tar::n02.tar::n02_0.JPEG"


def test_what_a_source_leaves_out_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = {"n01.tar": _tar({"a.jpg": jpeg(0)}), "loose.jpg": jpeg(1)}
    assert _build(write_tar(tmp_path / "t.tar", inner), tmp_path / "one")["samples"] == 1
    assert "left out 1 files that lie beside its tars, e.g. loose.jpg" in caplog.text
    members = {"1.left.jpg": jpeg(0), "1.right.jpg": jpeg(1)}
    summary = _build(write_tar(tmp_path / "pairs.tar", members), tmp_path / "two")
    assert (summary["samples"], summary["left_out_of_source"]) == (1, {"same_key": 1})


def test_list_of_members_takes_those_of_a_tar_of_tars(tmp_path: Path) -> None:
    inner = {f"{c}.tar": _tar({f"{i}.jpg": jpeg(10 * c + i) for i in range(3)}) for c in (1, 2)}
    outer = write_tar(tmp_path / "t.tar", inner)
    listing = tmp_path / "keep.txt"
    listing.write_text("".join(f"t.tar::{name}\n" for name in ("2.tar::0.jpg", "1.tar::2.jpg")))
    assert outer.exists()
    _build(listing, tmp_path / "out", seed=None)
    source = open_source(str(tmp_path / "out"))
    assert [source.data(i) for i in range(2)] == [jpeg(20), jpeg(12)]
    assert list(source.labels) == [1, 0]


def test_flat_tar_has_no_classes(tmp_path: Path) -> None:
    flat = write_tar(tmp_path / "val.tar", {f"ILSVRC2012_val_{i}.JPEG": jpeg(i) for i in range(5)})
    _build(flat, tmp_path / "out", prefix="val")
    source = open_source(str(tmp_path / "out" / "val-000000.tar"))
    assert source.labels is None
    assert not (tmp_path / "out" / "classes.txt").exists()


def test_cut_off_inner_tar_is_refused(tmp_path: Path) -> None:
    cut = _tar({"n01_0.JPEG": jpeg(0), "n01_1.JPEG": jpeg(1)})[:1200]
    outer = write_tar(tmp_path / "t.tar", {"n01.tar": cut, "n02.tar": _tar({"a": jpeg(3)})})
    with pytest.raises(DataError, match=r"n01\.tar is damaged or cut off"):
        _build(outer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_member_names_lead_nowhere(tmp_path: Path) -> None:
    hostile = {
        "../../escaped.tar": _tar({"../../../escaped.jpg": jpeg(0), "/etc/passwd": jpeg(1)}),
        "a\n.tar": _tar({"line\nbreak.cls": jpeg(2), "a.b/..": jpeg(3)}),
    }
    outer = write_tar(tmp_path / "t.tar", hostile)
    with pytest.raises(DataError, match="line break"):
        _build(outer, tmp_path / "out")
    outer = write_tar(tmp_path / "t.tar", {"../../escaped.tar": hostile["../../escaped.tar"]})
    _build(outer, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"t.tar", "out"}
    assert not list(tmp_path.parent.glob("escaped*"))
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        assert all(name.replace(".", "").isalnum() for name in tar.getnames())


def test_list_of_files_keeps_the_classes_of_their_folders(
    class_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = class_folder()
    chosen = [
        p for p in sorted(folder.rglob("*.jpg")) if p.name > "005" and "1" not in p.parent.name
    ]
    listing = tmp_path / "keep.txt"
    listing.write_text("".join(f"{p.relative_to(tmp_path)}\n\n" for p in chosen))
    _build(listing, tmp_path / "out", seed=None)
    source = open_source(str(tmp_path / "out"))
    assert [source.data(i) for i in range(len(source))] == [p.read_bytes() for p in chosen]
    assert [f"class {label}" for label in source.labels] == [p.parent.name for p in chosen]


def test_list_of_members_takes_those_of_the_shards(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar", {"x.jpg": jpeg(0), "x.cls": b"4", "y.jpg": jpeg(1), "y.cls": b"2"}
    )
    (tmp_path / "classes.txt").write_text("2\ttwo\n4\tfour\n")
    listing = tmp_path / "keep.txt"
    listing.write_text(f"{shard}::y.jpg\n")
    _build(listing, tmp_path / "out")
    assert (tmp_path / "out" / "classes.txt").read_text() == "2\ttwo\n4\tfour\n"
    source = open_source(str(tmp_path / "out"))
    assert [source.data(i) for i in range(len(source))] == [jpeg(1)]
    assert list(source.labels) == [2]


@pytest.mark.parametrize(
    ("lines", "says"),
    [("", "is empty"), ("gone.jpg\n", "the first is"), ("a.tar::b.jpg\nc.jpg\n", "mixes")],
)
def test_bad_list_is_refused(tmp_path: Path, lines: str, says: str) -> None:
    (tmp_path / "l.txt").write_text(lines)
    with pytest.raises(DataError, match=says):
        _build(tmp_path / "l.txt", tmp_path / "out")


@pytest.mark.parametrize(
    "bad",
    [
        {"max_side": 0},
        {"seed": -1},
        {"prefix": "../x"},
        {"prefix": ""},
        {"prefix": "\u00e9"},
        {"workers": 0},
    ],
)
def test_settings_out_of_range_are_refused(
    class_folder: Callable[..., Path], tmp_path: Path, bad: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=f"--{next(iter(bad)).replace('_', '-')}"):
        _build(class_folder(3), tmp_path / "out", **bad)


@pytest.mark.parametrize(
    ("text", "size"), [("256MiB", 2**28), ("1GB", 10**9), ("1.5 kb", 1500), ("77", 77)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1XB", "0", "1e9", "0.1", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        parse_bytes(text)
