import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from dinoscale.cluster.doctor.images import look
from dinoscale.data.augmentation.multi_crop import MultiCrop
from dinoscale.data.loader import train_batches
from dinoscale.data.shards.stream import StreamSource
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.mixture import left_out_counts, left_out_of, open_sources
from dinoscale.data.sources.source import open_source
from dinoscale.errors import DataError
from dinoscale.training.hooks.online_knn import OnlineKnn
from tests.distributed.tiny_run import tiny_config
from tests.unit.data.conftest import jpeg, write_tar

PICTURE = jpeg(0)


def _tar(folder: Path, *names: str) -> str:
    return str(write_tar(folder / "a.tar", [(name, PICTURE) for name in names]))


@pytest.mark.parametrize(
    ("names", "used", "counts"),
    [
        (["s/1.left.png", "s/1.right.png", "s/2.left.png"], 2, {"same_key": 1}),
        ([f"scan.{i:03}.jpg" for i in range(48)], 1, {"same_key": 47}),
        (["1.x.jpg", "1.x.cls", "v1.2/3.jpg"], 2, {}),
        (["1.jpg", "1.png", "1.small.jpg", "1.mask.png", "1.npy"], 1, {"companion": 2}),
        (["1.left.jpg", "1.left.png"], 1, {"companion": 1}),
        (["img.png", *(f"img.{i}.png" for i in range(1, 48))], 1, {"same_key": 47}),
        (["img.png", "img.1.png"], 1, {"same_key": 1}),
        (["1.png", "1.jpg", "1.left.jpg", "1.right.jpg"], 1, {"companion": 1, "same_key": 2}),
        (["1.jpg", "2.cls", "3.heic", "meta.json"], 1, {"no_picture": 2, "other_files": 1}),
        (["1.jpg", "0af3", ".hidden.jpg"], 1, {"no_extension": 1, "hidden": 1}),
        (["1.jpg", "._1.jpg", "d/._2.png", ".DS_Store", "__MACOSX/1.jpg"], 1, {}),
    ],
)
def test_each_picture_of_a_tar_is_used_or_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    used: int,
    counts: dict[str, int],
) -> None:
    for _ in range(2):  # scanned, then from the index
        source = TarSource([_tar(tmp_path, *names)])
        assert (len(source), source.left_out.counts) == (used, counts)
    monkeypatch.setenv("DINOSCALE_ALLOW_PIPE", "1")
    stream = StreamSource([f"pipe:cat {tmp_path}/a.tar"], [used], block_size=used)
    assert stream._reader(0).left_out.counts == counts
    assert left_out_counts(stream, [stream.take_left_out()]) == counts
    assert left_out_counts(stream) == {}  # before its shards are read


def test_text_without_extension_is_no_picture(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"1.jpg": PICTURE, "README": b"These pictures are"})
    assert TarSource([str(tar)]).left_out.counts == {}


def test_folder_counts_links_and_shards_but_no_junk(tmp_path: Path) -> None:
    for name in ("1.jpg", "._1.jpg", "notes.txt", "b.tar", "._c.tar"):
        (tmp_path / name).write_bytes(PICTURE)
    (tmp_path / "2.jpg").symlink_to("gone.jpg")
    (tmp_path / "readme.md").symlink_to("gone.md")
    source = open_source(str(tmp_path))
    assert (len(source), left_out_of(source).counts) == (1, {"dead_link": 1, "tar": 1})


def test_too_much_left_out_is_refused_with_what_and_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar = _tar(tmp_path, "1.left.jpg", "1.right.jpg", "2.jpg", "3.jpg")
    with caplog.at_level(logging.WARNING):
        source = open_sources([tar, "synthetic:shapes?images=9&size=8"], max_lost=0.25)
    assert left_out_of(source).counts == {"same_key": 1}
    assert "left out 1 pictures whose key" in caplog.text
    message = r"1 of 4 pictures .* data\.max_bad_fraction=0\.2 .*1\.right\.jpg.*a key of its own"
    for images in (None, 2):
        with pytest.raises(DataError, match=message):
            open_sources([tar], max_lost=0.2, subset_size=images)


def test_sets_of_the_online_knn_are_held_to_the_same_rule(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)
    sets = {"train": str(tmp_path), "test": str(tmp_path)}
    config = tiny_config(eval=sets, data={"train": "synthetic:shapes"})
    OnlineKnn(config)
    (tmp_path / "a" / "4.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"1 of 5 pictures .* data\.max_bad_fraction=0\.01 "):
        OnlineKnn(config)
    looked = look(config, ["here"], rank=0, timeout_s=1.0)
    errors = {name: of_set.error or "" for name, of_set in looked.items()}
    assert not errors["data.train"]
    assert "1 of 5 pictures" in errors["eval.train"]
    assert "1 of 5 pictures" in errors["eval.test"]


def test_compressed_shards_beside_plain_ones_are_lost(tmp_path: Path) -> None:
    _tar(tmp_path, "1.jpg", "2.jpg")
    for name in ("b.tar.gz", "c.tgz", "d.txz"):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
    assert left_out_of(open_source(str(tmp_path))).counts == {"compressed": 6}
    with pytest.raises(DataError, match=r"6 of 8 pictures .* b\.tar\.gz\. .*unpack these"):
        open_sources([str(tmp_path)], max_lost=0.7)


def test_pictures_beside_plain_ones_are_no_loss(tmp_path: Path) -> None:
    assert len(open_sources([_tar(tmp_path, "1.jpg", "1.png", "notes.txt")], max_lost=0.0)) == 1


def test_streams_count_as_tars_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DINOSCALE_ALLOW_PIPE", "1")
    tar = _tar(tmp_path, "1.left.jpg", "1.right.jpg", "2.jpg", "2.png", "._3.jpg", "3.jpg")
    source = StreamSource([f"pipe:cat {tar}"], [3], block_size=2, max_lost=0.25)
    with caplog.at_level(logging.WARNING):
        for index in (0, 1, 2, 0, 1, 2):
            source.picture(index)
    assert caplog.text.count("left out 1 pictures whose key") == 1
    strict = StreamSource([f"pipe:cat {tar}"], [3], block_size=3, max_lost=0.2)
    with pytest.raises(DataError, match=r"1 of 4 pictures would be left out"):
        strict.picture(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_stream_tell_once_what_is_left_out_of_each_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv("DINOSCALE_ALLOW_PIPE", "1")
    names = ["1.left.jpg", "1.right.jpg", "2.jpg", "3.jpg", "4.jpg"]
    urls = []
    for shard in "ab":
        tar = write_tar(tmp_path / f"{shard}.tar", [(name, PICTURE) for name in names])
        urls.append(f"pipe:cat {tar}")
    source = StreamSource(urls, [4, 4], block_size=2)
    crops = MultiCrop(global_size=16, local_size=8, num_local=1)
    batches = train_batches(
        source, crops, batch_size=4, micro_batch_size=4, seed=0, rank=0, world_size=1,
        start_step=0, stop_step=4, num_workers=workers, stream_readers=2,
    )  # fmt: skip  # two epochs
    found = [batch.left_out for batch in batches]
    assert left_out_counts(source, found) == {"same_key": 2}


def test_clean_shards_are_no_load_on_the_ranks_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOSCALE_ALLOW_PIPE", "1")
    source = StreamSource([f"pipe:cat {_tar(tmp_path, '1.jpg')}"], [1], block_size=1)
    source.picture(0)
    assert source.take_left_out() == {}


def test_index_made_by_other_rules_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOSCALE_CACHE", str(tmp_path / "cache"))
    tar = _tar(tmp_path, "1.left.jpg", "1.right.jpg")
    TarSource([tar])
    (index,) = (tmp_path / "cache").glob("*.index")
    made = os.stat(index).st_mtime_ns
    monkeypatch.setattr("dinoscale.data.shards.shard_index._RULES", 99)
    assert TarSource([tar]).left_out.counts == {"same_key": 1}
    assert os.stat(index).st_mtime_ns != made
