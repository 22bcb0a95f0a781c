import logging
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dinoscale.data.decode import BadSampleError
from dinoscale.data.folder import FolderSource
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


def test_one_loose_image_means_no_classes(tmp_path: Path) -> None:
    assert FolderSource(str(_write(tmp_path, "cat/1.jpg", "loose.jpg"))).labels is None


def test_files_that_are_no_images_by_name_are_left_out(tmp_path: Path) -> None:
    junk = [".DS_Store", "Thumbs.db", "labels.csv", "README.md", "page.HTML", "a.npy", "log.txt"]
    hidden = [".ipynb_checkpoints/a.jpg", ".git/b.jpg", "__MACOSX/._c.jpg"]
    kept = ["._apple.jpg", "UPPER.JPEG", "no-extension", "page.html.jpg", "x.weird"]
    source = FolderSource(str(_write(tmp_path, *junk, *hidden, *kept)))
    assert _names(source, tmp_path) == kept


def test_order_is_by_bytes_and_not_by_directory(tmp_path: Path) -> None:
    names = ["B.jpg", "a-b.jpg", "a.jpg", "a/1.jpg", "b.jpg", "\u00e9.jpg", "\u56fe.jpg"]
    assert _names(FolderSource(str(_write(tmp_path, *reversed(names)))), tmp_path) == names


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
    assert "skipped 1 links that lead nowhere, e.g. a/nowhere.jpg" in caplog.text
    assert "did not follow 1 links to a folder above them, e.g. a/loop" in caplog.text


def test_two_folders_linked_into_each_other_end(tmp_path: Path) -> None:
    _write(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a")
    expected = ["a/1.jpg", "a/to_b/2.jpg", "b/2.jpg", "b/to_a/1.jpg"]
    assert _names(FolderSource(str(tmp_path)), tmp_path) == expected


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(_write(tmp_path, "a.jpg") / "pipe.jpg")
    assert len(FolderSource(str(tmp_path))) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no images in the folder .* Name a folder"),
        (["a.txt", "b.txt", "c.csv"], r"it holds 2 \.txt, 1 \.csv"),
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


def test_source_survives_pickling(tmp_path: Path) -> None:
    source = FolderSource(str(_write(tmp_path, "x/a.jpg", "y/b.jpg")))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.path(1) == source.path(1)
    np.testing.assert_array_equal(copy.labels, source.labels)
    assert copy.picture(1).pixels().tobytes() == source.picture(1).pixels().tobytes()


def test_awkward_tree_lists_its_images_only(image_sets: Path, tmp_path: Path) -> None:
    with tarfile.open(image_sets / "odd-images" / "awkward-folder-tree.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    source = FolderSource(str(tmp_path / "tree"))
    bad = [os.path.basename(source.path(i)) for i in range(len(source)) if not decodes(source, i)]
    assert len(source) == 12  # with the loose one, the link and the AppleDouble file
    assert bad == ["._plain.jpg"]
    assert source.labels is None
