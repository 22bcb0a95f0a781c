"""Output files are written whole or not at all, and replace only files that we wrote."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from data_tools.journal import Journal, require_writable, write_whole
from dinoscale.errors import DataError, OutputError
from dinoscale.reports.html import write_file
from dinoscale.runtime import outputs
from dinoscale.runtime.outputs import (
    LIST_FILE,
    atomic_write,
    is_ours,
    replace_text,
    require_ours,
    staging_folder,
    swap,
    write_tensors,
)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as beside:
        beside.write_text(text)


@pytest.mark.parametrize("write", [write_file, write_whole], ids=["pages", "data tools"])
def test_only_files_unchanged_since_we_wrote_them_are_replaced(
    tmp_path: Path, write: Callable[[Path, bytes], None]
) -> None:
    path = tmp_path / "new" / "list.txt"
    write(path, b"one")
    write(path, b"two")
    assert path.read_bytes() == b"two"
    path.write_bytes(b"two, and a note of mine")
    with pytest.raises(OutputError, match=r"list\.txt exists, .*choose another name, or remove it"):
        write(path, b"three")
    assert path.read_bytes() == b"two, and a note of mine"
    path.write_bytes(b"")  # as mktemp leaves it
    write(path, b"four")
    assert sorted(os.listdir(path.parent)) == [LIST_FILE, path.name]


def test_text_of_a_run_is_replaced_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for text in ("old", "new \u00e9"):
        replace_text(tmp_path / "result.json", text)
    assert (tmp_path / "result.json").read_bytes() == "new \u00e9".encode()
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "device"])
def test_foreign_files_stay(tmp_path: Path, kind: str) -> None:
    thesis, path = tmp_path / "thesis", tmp_path / "out"
    thesis.write_text("years")
    if kind == "file":
        path.write_text("years")
    else:
        path.symlink_to({"link": thesis, "dangling link": "nowhere", "device": os.devnull}[kind])
    with pytest.raises(OutputError, match="is not as dinoscale wrote it"):
        _write(path, "minutes")
    assert thesis.read_text() == "years"
    assert sorted(os.listdir(tmp_path)) == ["out", "thesis"]


def test_the_input_is_not_overwritten_under_any_name(tmp_path: Path) -> None:
    _write(tmp_path / "keep.txt", "a.jpg\n")
    (tmp_path / "other.txt").symlink_to("keep.txt")
    for name in ("keep.txt", "other.txt"):
        with pytest.raises(OutputError, match="is the input"):
            require_writable(tmp_path / name, str(tmp_path / "keep.txt"))
    require_ours(tmp_path / "keep.txt", source="https://host/keep.txt")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "w"
    _write(path, "one")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UnicodeEncodeError), atomic_write(path) as beside:
        beside.write_text("\ud800")
    assert path.read_text() == "one"
    assert sorted(os.listdir(tmp_path)) == before
    with pytest.raises(DataError, match="cannot write"):
        require_writable(path / "below")


def test_two_writers_at_once_use_different_folders(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "w") as one, staging_folder(tmp_path / "w") as other:
        assert one != other


@pytest.mark.parametrize("folder", [True, False])
def test_a_failed_rename_restores_the_old_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, folder: bool
) -> None:
    target, rename = tmp_path / "w", os.replace
    if folder:
        target.mkdir()
        (target / "model").write_text("one")
    else:
        target.write_text("one")

    def fails(source: Path, to: Path) -> None:
        if Path(source).name == "w" and Path(source).parent != tmp_path:
            raise OSError("the disk is gone")
        rename(source, to)

    monkeypatch.setattr(outputs.os, "replace", fails)
    with staging_folder(target) as place:
        (place / "w").mkdir() if folder else (place / "w").write_text("two")
        with pytest.raises(OSError, match="the disk is gone"):
            swap(place / "w", target)
    assert (target / "model" if folder else target).read_text() == "one"
    assert os.listdir(tmp_path) == ["w"]


def test_a_link_to_a_folder_is_replaced_itself(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    target = tmp_path / "latest"
    target.symlink_to("first")
    with staging_folder(target) as place:
        (place / "latest").mkdir()
        (place / "latest" / "model").touch()
        swap(place / "latest", target)
    assert not target.is_symlink()
    assert os.listdir(target) == ["model"]
    assert os.listdir(tmp_path / "first") == []


@pytest.mark.parametrize("own", [False, True])
def test_a_list_that_cannot_be_written_loses_no_result(tmp_path: Path, *, own: bool) -> None:
    (tmp_path / LIST_FILE).mkdir()  # that of another user
    if own:
        (tmp_path / LIST_FILE.replace(".txt", f"-{os.getuid()}.txt")).mkdir()
    _write(tmp_path / "w", "one")
    assert (tmp_path / "w").read_text() == "one"
    assert is_ours(tmp_path / "w") is not own


def test_only_the_added_lines_of_a_list_are_read(tmp_path: Path) -> None:
    _write(tmp_path / "a", "one")
    assert is_ours(tmp_path / "a")
    listed = tmp_path / LIST_FILE
    with listed.open("r+b") as file:
        file.write(b"x" * (listed.stat().st_size - 1))
    _write(tmp_path / "b", "one")
    assert is_ours(tmp_path / "a")
    assert is_ours(tmp_path / "b")
    listed.write_bytes(b"")  # another one: nothing of what was read counts
    assert not is_ours(tmp_path / "a")


def test_a_name_may_have_any_character(tmp_path: Path) -> None:
    for name in ("\u2028.html", "a\x0cb\rc", os.fsdecode(b"\xff")):
        _write(tmp_path / name, "one")
        _write(tmp_path / name, "two")


def test_the_journal_is_not_written_over_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl.state"
    path.write_text("a diary\n")
    with pytest.raises(OutputError, match="is not a list of finished work"):
        Journal(path, "work")
    assert path.read_text() == "a diary\n"
    path.write_text('{"finger')  # as a kill may leave it
    Journal(path, "work").add(0, {})


def test_written_tensors_have_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {"said": "so"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"said": "so"}
    package = Path(outputs.__file__).parent
    writers = [path.name for path in package.rglob("*.py") if "save_file(" in path.read_text()]
    assert writers == ["outputs.py"]
