"""Masks are found for images that a list names, and are never the images themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoscale.data.sources.source import open_source
from dinoscale.errors import DataError
from dinoscale.evaluate.dense.object_masks import find_masks
from dinoscale.evaluate.dense_probes.target_files import TargetFiles
from dinoscale.evaluate.depth.depth_files import NYU_NAMES


def _gray(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


@pytest.mark.parametrize("names", [("a.png",), ("a.png", "sub/b.png")])
def test_a_list_outside_of_the_folder_of_its_images(tmp_path: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        _gray(tmp_path / "images" / name, 100)
        _gray(tmp_path / "masks" / name, number)
    spec = tmp_path / "lists" / "some.txt"
    spec.parent.mkdir()
    spec.write_text("".join(f"../images/{name}\n" for name in names))
    source = open_source(str(spec))
    files = TargetFiles.of(source, str(spec), str(tmp_path / "masks"), member="mask.png")
    mask_of = find_masks(source, str(spec), str(tmp_path / "masks"))
    for number in range(len(names)):
        for mask in (files.read(source, number), mask_of(number)):
            assert mask is not None
            assert np.unique(np.asarray(mask)).tolist() == [number]


@pytest.mark.parametrize("is_link", [False, True])
def test_an_image_is_not_its_own_mask(tmp_path: Path, is_link: bool) -> None:
    _gray(tmp_path / "images" / "a.png", 100)
    masks = tmp_path / "images"
    if is_link:
        masks = tmp_path / "masks"
        masks.mkdir()
        (masks / "a.png").symlink_to(tmp_path / "images" / "a.png")
    source = open_source(str(tmp_path / "images"))
    files = TargetFiles.of(source, str(tmp_path / "images"), str(masks), member="mask.png")
    with pytest.raises(DataError, match=r"a\.png is the image .* itself"):
        files.read(source, 0)
    with pytest.raises(DataError, match=r"a\.png is the image .* itself"):
        find_masks(source, str(tmp_path / "images"), str(masks))(0)


def test_depth_pictures_beside_their_images_have_none_of_their_own(tmp_path: Path) -> None:
    for name in ("rgb_1.png", "sync_depth_1.png"):
        _gray(tmp_path / name, 100)
    source = open_source(str(tmp_path))
    folder = str(tmp_path)
    files = TargetFiles.of(source, folder, folder, member="depth.png", renames=NYU_NAMES)
    found = {Path(source.path(i)).name: files.path(source, i) for i in range(len(source))}
    assert found == {"rgb_1.png": str(tmp_path / "sync_depth_1.png"), "sync_depth_1.png": None}
