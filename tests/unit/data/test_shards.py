import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.errors import DataError
from tests.unit.data.conftest import decodes, jpeg, write_tar


def _members(source: TarSource) -> list[str]:
    return [source.path(i).split("::")[1] for i in range(len(source))]


def _size(source: TarSource, index: int) -> tuple[int, int]:
    return source.picture(index).pixels().shape[1::-1]


def test_images_and_labels_come_in_the_order_of_the_shards(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "1.tar", {"a.jpg": jpeg(0), "a.cls": b"3", "b.jpg": jpeg(1)})
    two = write_tar(tmp_path / "0.tar", {"c.cls": b" 7\n", "c.png": jpeg(2, width=50)})
    source = TarSource([str(one), str(two)])
    assert [source.path(i) for i in range(3)] == [f"{one}::a.jpg", f"{one}::b.jpg", f"{two}::c.png"]
    np.testing.assert_array_equal(source.labels, [3, -1, 7])
    assert source.labels.dtype == np.int64
    assert [_size(source, i) for i in (2, 0)] == [(50, 30), (40, 30)]


def test_no_labels_at_all_are_none(tmp_path: Path) -> None:
    assert TarSource([str(write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(0)}))]).labels is None


@pytest.mark.parametrize(
    ("members", "image"),
    [
        (["k.mask.png", "k.jpg"], "k.jpg"),
        (["k.png", "k.jpg"], "k.jpg"),
        (["k.mask.png", "k.png"], "k.png"),
        (["k.seg.png", "k.left.jpg"], "k.left.jpg"),
        (["k.json", "k.JPEG", "k.txt"], "k.JPEG"),
        (["d.1/k.x.jpg", "d.1/k.x.cls"], "d.1/k.x.jpg"),
    ],
)
def test_picture_of_a_sample_is_not_its_mask(
    tmp_path: Path, members: list[str], image: str
) -> None:
    shard = write_tar(tmp_path / "a.tar", dict.fromkeys(members, jpeg(0)))
    assert _members(TarSource([str(shard)])) == [image]


def test_mask_alone_makes_no_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = write_tar(tmp_path / "a.tar", {"k.mask.png": jpeg(0), "l.jpg": jpeg(1)})
    with caplog.at_level(logging.WARNING):
        assert _members(TarSource([str(shard)])) == ["l.jpg"]
    assert "left out 1 samples with a label or a file of an unknown kind" in caplog.text


def test_other_files_of_a_sample_lie_beside_its_image(tmp_path: Path) -> None:
    first = write_tar(
        tmp_path / "1.tar",
        [
            ("alone.mask.png", b"of no image"),
            ("k.jpg", jpeg(0)),
            ("l.jpg", jpeg(1)),
            ("k.mask.png", b"of k"),
            ("l.txt", b"no mask"),
        ],
    )
    second = write_tar(tmp_path / "2.tar", {"k.mask.png": b"of the second k", "k.jpg": jpeg(2)})
    source = TarSource([str(first), str(second)])
    found = [source.sample_file(index, "mask.png") for index in range(3)]
    assert found == [b"of k", None, b"of the second k"]
    second.unlink()
    assert source.sample_file(0, "mask.png") == b"of k"
    fresh = TarSource([str(first)])
    first.write_bytes(first.read_bytes() + bytes(512))
    with pytest.raises(BadSampleError, match=r"k\.mask\.png: .* changed since"):
        fresh.sample_file(0, "mask.png")


def test_repeated_key_is_another_sample(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        [("k.jpg", jpeg(0)), ("k.cls", b"1"), ("k.jpg", jpeg(1, width=50)), ("k.cls", b"2")],
    )
    source = TarSource([str(shard)])
    np.testing.assert_array_equal(source.labels, [1, 2])
    assert [_size(source, i) for i in (0, 1)] == [(40, 30), (50, 30)]


def test_same_key_in_two_folders_or_shards_is_two_samples(tmp_path: Path) -> None:
    shards = [
        write_tar(tmp_path / f"{i}.tar", {"x/k.jpg": jpeg(0), "y/k.jpg": jpeg(1)}) for i in (0, 1)
    ]
    assert len(TarSource([str(path) for path in shards])) == 4


@pytest.mark.parametrize("text", [b"", b"abc", b"-1", b"1.0", b"9" * 19, b"1" * 100, b"\xff"])
def test_unreadable_label_is_unknown(tmp_path: Path, text: bytes) -> None:
    members = {"k.jpg": jpeg(0), "k.cls": text, "l.jpg": jpeg(1), "l.cls": b"5"}
    source = TarSource([str(write_tar(tmp_path / "a.tar", members))])
    np.testing.assert_array_equal(source.labels, [-1, 5])


def test_corrupt_image_is_a_bad_sample_naming_its_member(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"k.jpg": b"garbage", "l.jpg": b""})
    source = TarSource([str(shard)])
    with pytest.raises(BadSampleError, match=r"a\.tar::k\.jpg: not an image"):
        source.picture(0).pixels()
    with pytest.raises(BadSampleError, match=r"a\.tar::l\.jpg: the file is empty"):
        source.picture(1).pixels()


def test_shard_cut_after_opening_is_a_bad_sample(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"k.jpg": jpeg(0)})
    source = TarSource([str(shard)])
    os.truncate(shard, 600)
    with pytest.raises(BadSampleError, match="has become shorter"):
        source.picture(0).pixels()


def test_vanished_shard_is_a_bad_sample(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"k.jpg": jpeg(0)})
    source = TarSource([str(shard)])
    shard.unlink()
    with pytest.raises(BadSampleError, match="No such file"):
        source.picture(0).pixels()


def test_more_shards_than_descriptors_can_be_read(tmp_path: Path) -> None:
    shards = [str(write_tar(tmp_path / f"{i:03}.tar", {"k.jpg": jpeg(i)})) for i in range(140)]
    before = len(os.listdir("/dev/fd"))
    source = TarSource(shards)
    for i in (*range(140), 0, 139):
        alone = TarSource([shards[i]]).picture(0).pixels()
        np.testing.assert_array_equal(source.picture(i).pixels(), alone)
    assert len(os.listdir("/dev/fd")) - before <= 129  # with the index
    del source
    assert len(os.listdir("/dev/fd")) <= before  # another test may have left one to be collected


def test_source_survives_pickling_without_its_descriptors(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"k.jpg": jpeg(0), "k.cls": b"4"})
    source = TarSource([str(shard)])
    expected = source.picture(0).pixels().tobytes()
    copy = pickle.loads(pickle.dumps(source))
    del source  # closes its descriptor
    assert copy.picture(0).pixels().tobytes() == expected
    np.testing.assert_array_equal(copy.labels, [4])


def _damaged(tmp_path: Path, kind: str) -> Path:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(0), "b.jpg": jpeg(1), "c.jpg": jpeg(2)})
    data = bytearray(path.read_bytes())
    second = 512 + -(-len(jpeg(0)) // 512) * 512
    if kind == "header":
        data[second : second + 100] = b"?" * 100
    elif kind == "cut in an image":
        data = data[: second + 700]
    elif kind == "cut in a header":
        data = data[: second + 100]
    elif kind == "empty":
        data = bytearray()
    elif kind == "html":
        data = bytearray(b"\n<html>404</html>")
    elif kind == "noise":
        data[:512] = b"\x07" * 512
    elif kind == "gzip":
        data[:2] = b"\x1f\x8b"
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("header", "no valid header at byte 1536"),
        ("cut in an image", "damaged or cut off"),
        ("cut in a header", "damaged or cut off"),
        ("empty", r"is empty \(0 bytes\)"),
        ("html", "web page, not a tar"),
        ("noise", "damaged or cut off"),
        ("gzip", "compressed .*gunzip"),
    ],
)
def test_damaged_shard_is_refused_by_name(tmp_path: Path, kind: str, message: str) -> None:
    good = write_tar(tmp_path / "good.tar", {"a.jpg": jpeg(0)})
    bad = _damaged(tmp_path, kind)
    with pytest.raises(DataError, match=message) as caught:
        TarSource([str(good), str(bad)])
    assert str(bad) in str(caught.value)


def test_unreadable_shard_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the shard .*none\.tar: No such file"):
        TarSource([str(tmp_path / "none.tar")])


def test_missing_end_mark_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(0)})
    os.truncate(path, 512 + -(-len(jpeg(0)) // 512) * 512)
    with caplog.at_level(logging.WARNING):
        assert len(TarSource([str(path)])) == 1
    assert "no end mark" in caplog.text


def test_empty_shard_among_others_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = write_tar(tmp_path / "full.tar", {"a.jpg": jpeg(0)})
    empty = write_tar(tmp_path / "empty.tar", {})
    with caplog.at_level(logging.WARNING):
        source = TarSource([str(empty), str(full)])
    assert "no images in" in caplog.text
    assert source.path(0).endswith("full.tar::a.jpg")
    with pytest.raises(DataError, match="no images in"):
        TarSource([str(empty)])


@pytest.mark.parametrize(
    ("shard", "labels"),
    [
        ("bad-cls", [-1, -1, -1, 2, -1, 99999]),
        ("duplicate-keys", [0, 1, 2, 0, 1]),
        ("gnu-format-long-names", [0, 1, 2]),
        ("jpg-and-cls-far-apart", [0, 1, 2, 0, 1, 2]),
        ("missing-cls", [0, 1, -1, 0, 1, -1]),
        ("missing-image", [0, 2, 0, 1, 2]),
        ("mixed-extensions", [0, 1, 2, 0, 1, -1]),
        ("nested-and-dotted-names", [0, 1, 2, 0]),
        ("pax-long-unicode-names", [0, 1, 2]),
    ],
)
def test_odd_shards_give_all_their_samples(image_sets: Path, shard: str, labels: list[int]) -> None:
    source = TarSource([str(image_sets / "odd-images" / "shards" / f"{shard}.tar")])
    np.testing.assert_array_equal(source.labels, labels)
    for i in range(len(source)):
        source.picture(i).pixels()


def test_half_of_the_corrupt_shard_decodes(image_sets: Path) -> None:
    source = TarSource([str(image_sets / "odd-images" / "shards" / "some-corrupt-images.tar")])
    assert [i for i in range(len(source)) if not decodes(source, i)] == [1, 3, 4]
