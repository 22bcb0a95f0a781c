import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dinoscale.data.shards.remote import require_allowed
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.classes import classes_of
from dinoscale.data.sources.folder import FolderSource, ListSource
from dinoscale.data.sources.source import expand_braces, open_source
from dinoscale.errors import DataError, UnavailableError
from tests.unit.data.conftest import Storage, jpeg, write_tar


def _shards(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        write_tar(folder / f"train-{i:03}.tar", {f"{i}.jpg": jpeg(i), f"{i}.cls": b"1"})
    return folder


def test_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    assert isinstance(open_source(str(tmp_path)), FolderSource)


def test_list_of_images(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "list.TXT").write_text("a.jpg\n")
    assert isinstance(open_source(str(tmp_path / "list.TXT")), ListSource)


@pytest.mark.parametrize(
    ("opened", "spec"),
    [
        (open_source, "https://me:0123abcd@host/a.tar"),
        (open_source, "https://me:0123abcd@[host/a.tar"),
        (open_source, "ftp://me:0123abcd@host/a.tar?sig=0123abcd"),
        (expand_braces, "https://me:0123abcd@host/{a.tar"),
        (require_allowed, "https://me:0123abcd@ho\u2100st/a.tar"),  # reads a/c: no name of a host
    ],
)
def test_a_password_in_a_url_is_in_no_error(opened: Callable[[str], object], spec: str) -> None:
    with pytest.raises(DataError) as caught:
        opened(spec)
    assert "0123abcd" not in str(caught.value)


def test_generated_images() -> None:
    assert open_source("synthetic:shapes?images=3&size=16").picture(2).pixels().shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("train-001.tar", 1),
        ("train-{000..002}.tar", 3),
        ("train-{000,002}.tar", 2),
        ("train-*.tar", 3),
        ("train-00[12].tar", 2),
        ("{train-000,train-00[12]}.tar", 3),
        ("", 3),
        ("../d/", 3),
    ],
)
def test_shards_by_name_pattern_and_folder(tmp_path: Path, spec: str, count: int) -> None:
    source = open_source(str(_shards(tmp_path / "d", 3)) + "/" + spec)
    assert isinstance(source, TarSource)
    assert len(source) == count
    assert [source.path(i) for i in range(count)] == sorted(source.path(i) for i in range(count))


def test_folder_of_shards_may_hold_a_class_list(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _shards(tmp_path / "d", 2)
    (folder / "classes.txt").write_text("0\tdog\n")
    with caplog.at_level(logging.INFO):
        assert len(open_source(str(folder))) == 2
    assert "2 .tar shards: reading those" in caplog.text


def test_shards_among_images_are_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _shards(tmp_path / "d", 2)
    (folder / "a.jpg").write_bytes(jpeg(0))
    with caplog.at_level(logging.WARNING):
        assert len(open_source(str(folder))) == 1
    assert "left out 2 .tar files" in caplog.text


def test_names_with_pattern_characters_are_taken_literally(tmp_path: Path) -> None:
    for name in ("odd {a,b} [1]", "one, two"):
        folder = _shards(tmp_path / name, 1)
        assert len(open_source(str(folder))) == 1
        assert len(open_source(str(folder / "train-000.tar"))) == 1


def test_brackets_of_a_folder_are_no_glob_beside_braces(tmp_path: Path) -> None:
    folder = _shards(tmp_path / "set [1]", 3)
    assert len(open_source(str(folder / "train-{000..002}.tar"))) == 3


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _shards(tmp_path / "d", 1)
    assert len(open_source("~/d")) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "is empty"),
        ("https://host/a.tar", "can only be trained on, as data.train, and alone.*local"),
        ("S3://bucket/a.tar", "can only be trained on"),
        ("pipe:cat a.tar", "can only be trained on"),
        ("az://box/a.tar", "cannot be read over the network; https, s3, gs and hdfs can"),
        ("{tmp}/none/deep", "does not exist .the nearest folder that does is {tmp}."),
        ("{tmp}/none-*.tar", "no file matches"),
        ("{tmp}/d/train-{{000..004}}.tar", r"2 of 5 shards are not there.*train-003\.tar"),
        ("{tmp}/d/{{a", "not a brace pattern"),
        ("{tmp}/{{0..99999999999}}.tar", "names more than 1000000 files"),
        ("{tmp}/" + "{{a,b}}" * 40, "names more than 1000000 files"),
        ("{tmp}/{{0.." + "9" * 5000 + "}}.tar", "not a brace pattern"),
        ("{tmp}/a.jpg", "is not a .tar shard"),
        ("{tmp}/*.jpg", "a.jpg is not a .tar shard .named by"),
        ("{tmp}/gz", "compressed .gzip"),
    ],
)
def test_useless_spec_is_refused_with_a_remedy(tmp_path: Path, spec: str, message: str) -> None:
    _shards(tmp_path / "d", 3)
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "a.tar.gz").write_bytes(b"\x1f\x8b" + bytes(100))
    with pytest.raises(DataError, match=message.replace("{tmp}", str(tmp_path))):
        open_source(spec.format(tmp=tmp_path))


def test_odd_files_in_one_folder_all_count(image_sets: Path, tmp_path: Path) -> None:
    for kind in ("loads", "fails"):
        for path in (image_sets / "odd-images" / kind).iterdir():
            (tmp_path / path.name).symlink_to(path)
    assert len(open_source(str(tmp_path))) == 99  # without an AppleDouble file


@pytest.mark.parametrize("fails", ["set", "/a/", "link.jpg", "list.txt", "/s.tar", "classes.txt"])
def test_a_file_system_that_fails_for_a_while_changes_nothing(
    tmp_path: Path, storage: Storage, fails: str
) -> None:
    """The folder itself, one in it, what a link leads to, a list, a shard, names of classes."""
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "other.jpg").write_bytes(jpeg(0))
    (tmp_path / "set" / "a" / "link.jpg").symlink_to(tmp_path / "other.jpg")
    (tmp_path / "set" / "a" / "0.jpg").write_bytes(jpeg(1))
    (tmp_path / "list.txt").write_text("set/a/0.jpg\nset/a/link.jpg\n")
    write_tar(tmp_path / "s.tar", {"0.jpg": jpeg(0), "1.jpg": jpeg(1), "1.cls": b"0"})
    (tmp_path / "classes.txt").write_text("0\tant\n")
    name = {"list.txt": "list.txt", "/s.tar": "s.tar", "classes.txt": "s.tar"}.get(fails, "set")

    def use() -> int:
        source = open_source(str(tmp_path / name))
        if fails == "classes.txt":
            classes_of(source, np.zeros(1, dtype=np.int64))
        return sum(source.picture(i).width > 0 for i in range(len(source)))

    storage.fails = {fails: 2}
    assert use() == 2
    assert storage.slept == [1.0, 2.0]
    storage.fails = {fails: math.inf}
    with pytest.raises(UnavailableError, match=r"cannot read .*Stale file handle"):
        use()
