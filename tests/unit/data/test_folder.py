import logging
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.folder import FolderSource, ListSource
from dinoscale.errors import DataError
from tests.unit.data.conftest import decodes, jpeg


def _write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(0))
    return root


def _names(source: FolderSource, root: Path) -> list[str]:
    return [os.path.relpath(source.path(i), root) for i in range(len(source))]


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = FolderSource(str(_write(tmp_path, "b.jpg", "a.png")))
    assert _names(source, tmp_path) == ["a.png", "b.jpg"]
    assert source.labels is None
    assert source.class_names is None
    assert source.picture(0).pixels().shape == (30, 40, 3)


def test_first_level_folder_is_the_class(tmp_path: Path) -> None:
    source = FolderSource(str(_write(tmp_path, "dog/1.jpg", "cat/x/y/2.jpg", "cat/1.jpg")))
    assert _names(source, tmp_path) == ["cat/1.jpg", "cat/x/y/2.jpg", "dog/1.jpg"]
    assert source.class_names == ["cat", "dog"]
    np.testing.assert_array_equal(source.labels, [0, 0, 1])


def test_classes_are_sorted_by_name_where_images_are_sorted_by_path(tmp_path: Path) -> None:
    source = FolderSource(str(_write(tmp_path, "a/1.jpg", "a-b/1.jpg", "b/1.jpg")))
    assert _names(source, tmp_path) == ["a-b/1.jpg", "a/1.jpg", "b/1.jpg"]
    assert source.class_names == ["a", "a-b", "b"]
    np.testing.assert_array_equal(source.labels, [1, 0, 2])


def test_one_loose_image_means_no_classes(tmp_path: Path) -> None:
    assert FolderSource(str(_write(tmp_path, "cat/1.jpg", "loose.jpg"))).labels is None


def test_files_that_are_no_images_by_name_are_left_out(tmp_path: Path) -> None:
    junk = [".DS_Store", "Thumbs.db", "labels.csv", "README.md", "page.HTML", "a.npy", "log.txt"]
    hidden = [".ipynb_checkpoints/a.jpg", ".git/b.jpg", "__MACOSX/c.jpg", "a/._apple.jpg"]
    kept = ["UPPER.JPEG", "no-extension", "page.html.jpg", "x.weird"]
    source = FolderSource(str(_write(tmp_path, *junk, *hidden, *kept)))
    assert _names(source, tmp_path) == kept


def test_order_is_by_bytes_and_not_by_directory(tmp_path: Path) -> None:
    names = ["B.jpg", "a-b.jpg", "a.jpg", "a/1.jpg", "b.jpg", "\u00e9.jpg", "\u56fe.jpg"]
    assert _names(FolderSource(str(_write(tmp_path, *reversed(names)))), tmp_path) == names


@settings(deadline=None, max_examples=60)
@given(
    st.sets(
        st.lists(st.sampled_from(["a", "b", "a b", "a.b", "a0", "\u00e9"]), max_size=3).map(tuple)
    )
)
def test_any_tree_is_listed_in_the_order_of_its_paths(folders: set[tuple[str, ...]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        names = ["/".join((*folder, f"{file}.jpg")) for folder in folders for file in "a1"]
        _write(Path(root), *names, "z.jpg")
        expected = sorted([*names, "z.jpg"], key=os.fsencode)
        assert _names(FolderSource(root), Path(root)) == expected


def test_links_are_followed_but_not_in_circles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = _write(tmp_path / "root", "a/1.jpg")
    _write(tmp_path / "elsewhere", "2.jpg")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "file.jpg").symlink_to(root / "a" / "1.jpg")
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "nowhere.jpg").symlink_to("not-there.jpg")
    with caplog.at_level(logging.WARNING):
        source = FolderSource(str(root))
    assert _names(source, root) == ["a/1.jpg", "a/file.jpg", "linked/2.jpg"]
    assert "1 links that lead nowhere, e.g. a/nowhere.jpg" in caplog.text
    assert "1 links to a folder above them, e.g. a/loop" in caplog.text


def test_two_folders_linked_into_each_other_end(tmp_path: Path) -> None:
    _write(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a")
    expected = ["a/1.jpg", "a/to_b/2.jpg", "b/2.jpg", "b/to_a/1.jpg"]
    assert _names(FolderSource(str(tmp_path)), tmp_path) == expected


def test_link_to_itself_leads_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").symlink_to("b.jpg")
    assert len(FolderSource(str(tmp_path))) == 1
    assert "left out 1 links that lead nowhere, e.g. b.jpg" in caplog.text


@contextmanager
def _deep(root: Path, name: str, *, depth: int) -> Iterator[None]:
    """Folders in each other; the standard library neither makes nor removes so many."""
    before = os.getcwd()
    try:
        os.chdir(root)
        for _ in range(depth):
            os.mkdir(name)
            os.chdir(name)
        yield
    finally:
        os.chdir(before)
        subprocess.run(["rm", "-r", str(root / name)], check=True)


def test_deep_and_many_empty_folders_are_no_obstacle(tmp_path: Path) -> None:
    for i in range(2000):
        (tmp_path / str(i)).mkdir()
    message = r"no images in the folder .* and its 3500 subfolders\. Name"
    with _deep(tmp_path, "d", depth=1500), pytest.raises(DataError, match=message):
        FolderSource(str(tmp_path))


def test_folder_deeper_than_any_path_is_refused(tmp_path: Path) -> None:
    message = r"cannot list the folder .*File name too long"
    with _deep(tmp_path, "x" * 250, depth=20), pytest.raises(DataError, match=message):
        FolderSource(str(tmp_path))


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(_write(tmp_path, "a.jpg") / "pipe.jpg")
    assert len(FolderSource(str(tmp_path))) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no images in the folder .* Name a folder"),
        (["a.txt", "b.txt", "c.csv"], r"it holds 2 \.txt, 1 \.csv"),
        (["x/y/a.txt"], r" and its 2 subfolders \(it holds 1 \.txt\)"),
    ],
)
def test_folder_without_images_says_what_it_holds(
    tmp_path: Path, names: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        FolderSource(str(_write(tmp_path, *names)))


def test_file_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        FolderSource(str(_write(tmp_path, "a.jpg") / "a.jpg"))


def test_vanished_file_is_a_bad_sample(tmp_path: Path) -> None:
    source = FolderSource(str(_write(tmp_path, "a.jpg", "b.jpg")))
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(BadSampleError, match=r"a\.jpg: cannot be read: No such file"):
        source.picture(0).pixels()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a pipe", "it is not a plain file"),
        ("a folder", "it is not a plain file"),
        ("a hole", "9000000000 bytes are too many for one image"),
        ("empty", "the file is empty"),
    ],
)
def test_image_that_became_something_else_is_a_bad_sample(
    tmp_path: Path, kind: str, message: str
) -> None:
    source = FolderSource(str(_write(tmp_path, "a.jpg")))
    path = tmp_path / "a.jpg"
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 9_000_000_000 if kind == "a hole" else 0)
    with pytest.raises(BadSampleError, match=message):
        source.picture(0)


# Root may read everything: a child gives up its rights, in a folder that it may reach.
_AS_NOBODY = """
import os, sys
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.sources.folder import FolderSource
from dinoscale.errors import DataError
os.chdir(sys.argv[1])
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    FolderSource("images").picture(0)
except (DataError, BadSampleError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("forbidden", "mode", "message"),
    [
        (
            "images/a.jpg",
            0o000,
            "UnavailableSampleError .*/images/a.jpg: cannot be read: Permission denied",
        ),
        ("images", 0o000, "DataError cannot list the folder .*/images/: Permission denied"),
        ("images/sub", 0o000, "DataError cannot list the folder .*/images/sub/: Permission denied"),
    ],
)
def test_what_may_not_be_read_is_named(forbidden: str, mode: int, message: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        _write(root / "images", "a.jpg", "sub/b.jpg")
        (root / forbidden).chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", _AS_NOBODY, folder], capture_output=True, text=True, check=False
        )
        (root / forbidden).chmod(0o755)
    assert re.match(message, done.stdout), done


def test_names_are_kept_in_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    root = _write(tmp_path / "images", "a.jpg")
    source = FolderSource(str(root))
    assert len(os.listdir(temporary)) == 1
    assert len(pickle.dumps(source)) < 2000
    del source
    assert os.listdir(temporary) == []
    temporary.rmdir()
    with pytest.raises(DataError, match=r"cannot keep the names .*Set TMPDIR to a folder"):
        FolderSource(str(root))


def test_source_survives_pickling(tmp_path: Path) -> None:
    source = FolderSource(str(_write(tmp_path, "x/a.jpg", "y/b.jpg")))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.path(1) == source.path(1)
    np.testing.assert_array_equal(copy.labels, source.labels)
    assert copy.picture(1).pixels().tobytes() == source.picture(1).pixels().tobytes()


def test_awkward_tree_lists_its_images_only(image_sets: Path, tmp_path: Path) -> None:
    with tarfile.open(image_sets / "odd-images" / "awkward-folder-tree.tar") as tar:
        known = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
        tar.extractall(tmp_path, **known)
    source = FolderSource(str(tmp_path / "tree"))
    bad = [os.path.basename(source.path(i)) for i in range(len(source)) if not decodes(source, i)]
    assert len(source) == 11  # with the loose one and the link
    assert bad == []
    packed = TarSource([str(image_sets / "odd-images" / "awkward-folder-tree.tar")])
    assert len(packed) == 10  # the same without the link, which is no file of a tar
    assert source.labels is None


def _list(folder: Path, content: bytes) -> ListSource:
    (folder / "list.txt").write_bytes(content)
    return ListSource(str(folder / "list.txt"))


def test_list_names_images_in_its_order(tmp_path: Path) -> None:
    _write(tmp_path, "b.jpg", "x/a b.jpg", "\udcff.jpg")
    source = _list(
        tmp_path,
        b"\xef\xbb\xbfx/a b.jpg\n\n  \nb.jpg\r\n" + os.fsencode(tmp_path) + b"/\xff.jpg\nb.jpg",
    )
    names = [os.path.relpath(source.path(i), tmp_path) for i in range(len(source))]
    assert names == ["x/a b.jpg", "b.jpg", "\udcff.jpg", "b.jpg"]
    assert all(decodes(source, i) for i in range(4))
    assert (source.labels, source.class_names) == (None, None)
    assert pickle.loads(pickle.dumps(source)).path(1) == source.path(1)


def test_missing_file_of_a_list_is_a_bad_sample(tmp_path: Path) -> None:
    _write(tmp_path, "a.jpg")
    source = _list(tmp_path, b"gone.jpg\na.jpg\n/dev/zero\nnull\0byte.jpg\n")
    assert [decodes(source, i) for i in range(4)] == [False, True, False, False]
    with pytest.raises(BadSampleError, match=r"gone\.jpg: cannot be read: No such file"):
        source.picture(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty. Write one path"),
        (b"\n \n\r\n", "is empty. Write one path"),
        (b"no.jpg\n" * 300 + b"a.jpg\n", "none of the first 100 files .* exists, e.g. .*/no.jpg"),
        (b"a.jpg\n" + b"x" * 5000, "a line of more than 4096 bytes: it is not a list"),
        ("a.jpg\n".encode("utf-16"), "none of the first 2 files"),
    ],
)
def test_useless_list_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    _write(tmp_path, "a.jpg")
    with pytest.raises(DataError, match=message):
        _list(tmp_path, content)
