"""Listing of videos: tars, folders and DAVIS; what is missing is named."""

from __future__ import annotations

import io
import math
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoscale.data.decoding.decode import RGB, Animation, BadSampleError
from dinoscale.data.sources.videos import VOID, list_videos, object_numbers, open_videos
from dinoscale.errors import DataError, UnavailableError
from tests.unit.data.conftest import Storage

SIZE = (6, 8)


def _png(mask: np.ndarray, *, indexed: bool) -> bytes:
    image = Image.fromarray(mask.astype(np.uint8))
    if indexed:
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _jpg(size: tuple[int, int] = SIZE) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size[1], size[0]), (90, 120, 30)).save(file, format="JPEG")
    return file.getvalue()


def _mask(object_value: int = 255) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[2:4, 3:6] = object_value
    return mask


def _files(sequence: str, frames: int = 3) -> dict[str, bytes]:
    files = {f"{sequence}/{i:05d}.jpg": _jpg() for i in range(frames)}
    masks = {f"{sequence}/{i:05d}.mask.png": _png(_mask(), indexed=False) for i in range(frames)}
    return files | masks


def _tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def _davis(root: Path) -> Path:
    files = {}
    for sequence in ("bear", "car"):
        for i in range(2):
            files[f"JPEGImages/480p/{sequence}/{i:05d}.jpg"] = _jpg()
            files[f"Annotations/480p/{sequence}/{i:05d}.png"] = _png(_mask(2), indexed=True)
    return _tree(root, files)


def test_tars_folders_and_unpacked_tars_give_the_same_videos(tmp_path: Path) -> None:
    files = _files("car") | _files("bear", frames=2)
    _tar(tmp_path / "some.tar", files)
    _tree(tmp_path / "tree", files)
    for spec in ("some.tar", "", "*.tar", "tree"):
        videos = open_videos(os.path.join(tmp_path, spec))
        assert [video.name for video in videos] == ["bear", "car"]
        assert [len(video.frames) for video in videos] == [2, 3]
        assert videos[1].pixels(2, RGB).shape == (*SIZE, 3)
        assert np.array_equal(videos[1].mask(2, size=SIZE), _mask(1))  # grey 255 is object 1


def test_names_in_a_tar_may_begin_with_the_folder_itself(tmp_path: Path) -> None:
    """As `tar -C folder .` writes them: in one tar of all videos, or in a tar for each."""
    files = _files("car") | _files("bear", frames=2)
    _tar(tmp_path / "all.tar", {f"./{name}": data for name, data in files.items()})
    (tmp_path / "each").mkdir()
    for sequence in ("car", "bear"):
        of_one = {n.replace(sequence, "."): data for n, data in files.items() if sequence in n}
        _tar(tmp_path / "each" / f"{sequence}.tar", of_one)
    for spec in ("all.tar", "each"):
        videos = open_videos(str(tmp_path / spec))
        assert [(video.name, len(video.frames)) for video in videos] == [("bear", 2), ("car", 3)]


def test_a_folder_that_cannot_be_listed_costs_no_video(tmp_path: Path, storage: Storage) -> None:
    _tree(tmp_path, _files("car") | _files("bear", frames=2))
    storage.fails = {"/bear": 1}
    assert [video.name for video in open_videos(str(tmp_path))] == ["bear", "car"]
    storage.fails = {"/bear": math.inf}
    with pytest.raises(UnavailableError, match=r"cannot read the folder .*Stale file handle"):
        open_videos(str(tmp_path))


def test_one_frame_of_two_tars_is_refused(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        _tar(tmp_path / name, _files("car"))
    with pytest.raises(DataError, match=r"a\.tar::car/00000\.jpg and .*b\.tar.* the same frame"):
        open_videos(str(tmp_path))


def test_davis_takes_its_validation_list_and_keeps_object_numbers(tmp_path: Path) -> None:
    root = _davis(tmp_path)
    assert [video.name for video in open_videos(str(root))] == ["bear", "car"]
    _tree(root, {"ImageSets/2017/val.txt": b"car\n"})
    (video,) = open_videos(str(root))
    assert video.name == "car"
    assert np.array_equal(video.mask(1, size=SIZE), _mask(2))
    assert [video.name for video in open_videos(str(root), names=["bear"])] == ["bear"]
    with pytest.raises(DataError, match="no sequence 'cow'"):
        open_videos(str(root), names=["cow"])


def test_frames_every_five_are_no_gap(tmp_path: Path) -> None:
    files = _files("car", frames=11)
    kept = {name: data for name, data in files.items() if int(name[4:9]) % 5 == 0}
    (video,) = open_videos(str(_tree(tmp_path, kept)))
    assert [frame.number for frame in video.frames] == [0, 5, 10]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"car/00002.jpg": None}, "car: frames are missing between 00001 and 00003"),
        ({"car/00000.mask.png": None}, "car: the first frame.*has no mask"),
        ({"car/000001.jpg": _jpg()}, "two frames have the number 1"),
        ({"car/cover.jpg": _jpg()}, "cover.jpg: a frame is named by its number"),
    ],
)
def test_what_is_missing_or_odd_is_named(
    tmp_path: Path, change: dict[str, bytes | None], says: str
) -> None:
    files = {k: v for k, v in (_files("car", frames=5) | change).items() if v is not None}
    with pytest.raises(DataError, match=says):
        open_videos(str(_tar(tmp_path / "x.tar", files)))


def test_frames_without_masks_may_have_gaps_but_no_number_twice(tmp_path: Path) -> None:
    frames = {f"car/{i:05d}.jpg": _jpg() for i in (0, 1, 3, 7)}
    (video,) = list_videos(str(_tree(tmp_path / "a", frames)))
    assert [frame.number for frame in video.frames] == [0, 1, 3, 7]
    (flat,) = list_videos(str(tmp_path / "a" / "car"))
    assert flat == video
    with pytest.raises(DataError, match="two frames have the number 3"):
        list_videos(str(_tree(tmp_path / "b", frames | {"car/3.png": _jpg()})))


def _animation(frames: int, kind: str, **more: Any) -> bytes:
    """Gray frames, of which each is brighter."""
    pictures = [Image.new("RGB", (SIZE[1], SIZE[0]), (40 * i,) * 3) for i in range(frames)]
    file = io.BytesIO()
    pictures[0].save(file, kind, save_all=True, append_images=pictures[1:], **more)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_frames_of_a_file_are_decoded_in_any_order(kind: str) -> None:
    more = {"lossless": True} if kind == "WEBP" else {}
    data = _animation(4, kind, duration=50, **more)
    animation = Animation(data, "x", RGB)
    assert (len(animation), animation.fps) == (4, 20)
    for index in (0, 1, 3, 2, 0):
        pixels = animation.pixels(index)
        assert pixels.shape == (*SIZE, 3)
        assert (pixels == 40 * index).all()
    # Frames that store only what changes: every one builds on those before it.
    frames = [np.full((24, 24, 3), 30, np.uint8) for _ in range(5)]
    for index, frame in enumerate(frames):
        frame[3 * index : 3 * index + 5, 2:8] = (200, 50, 50)
    file = io.BytesIO()
    first, *others = map(Image.fromarray, frames)
    first.save(file, kind, save_all=True, append_images=others, duration=50, **more)
    for order in ((4, 1), (1, 0, 1, 2, 3, 4, 0, 1), (0, 1, 2, 3, 4, 1, 2), (3, 2), (2, 2)):
        animation = Animation(file.getvalue(), "x", RGB)
        for index in order:
            assert np.abs(animation.pixels(index).astype(int) - frames[index]).max() <= 8


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_frames_per_second_are_of_most_frames(kind: str) -> None:
    data = _animation(4, kind, duration=[3000, 40, 40, 40])
    assert Animation(data, "x", RGB).fps == 25


def test_a_still_picture_is_one_frame_and_damaged_ones_are_named() -> None:
    still = Animation(_jpg(), "x", RGB)
    assert (len(still), still.fps) == (1, None)
    with pytest.raises(BadSampleError, match="x: the file is empty"):
        Animation(b"", "x", RGB)
    cut = Animation(_animation(4, "PNG")[:-40], "x.png", RGB)
    with pytest.raises(BadSampleError, match=r"x\.png, frame 3: "):
        cut.pixels(3)
    assert (cut.pixels(1) == 40).all()


def test_a_folder_without_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no videos"):
        open_videos(str(_tree(tmp_path, {"notes.txt": b""})))
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(DataError, match="Annotations is missing"):
        open_videos(str(tmp_path))


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (_png(np.zeros((5, 5)), indexed=True), "the mask has 5 x 5 pixels, its frame 8 x 6"),
        (b"\x89PNG\r\n\x1a\n damaged", "not a readable PNG mask"),
        (_png(np.zeros((*SIZE, 3)), indexed=False), "one number per pixel.*RGB"),
        (_jpg(), "not a readable PNG mask"),
    ],
)
def test_masks_that_cannot_be_used_are_named(tmp_path: Path, mask: bytes, says: str) -> None:
    (video,) = open_videos(str(_tree(tmp_path, _files("car") | {"car/00001.mask.png": mask})))
    with pytest.raises(DataError, match=f"00001.mask.png: .*{says}"):
        video.mask(1, size=SIZE)


def test_a_first_mask_without_objects_or_with_a_photograph_is_refused() -> None:
    assert object_numbers(np.array([[0, 4], [VOID, 2]], dtype=np.uint8), name="x") == [2, 4]
    with pytest.raises(DataError, match="shows no object"):
        object_numbers(np.zeros(SIZE, dtype=np.uint8), name="x")
    with pytest.raises(DataError, match="shows 199 objects"):
        object_numbers(np.arange(200, dtype=np.uint8).reshape(10, 20), name="x")
