"""Odd, damaged, vanishing and changing files as whole sources, through the loader."""

import csv
import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinoscale.data.augmentation.multi_crop import MultiCrop
from dinoscale.data.loader import Batch, train_batches
from dinoscale.data.sources.source import Source, open_source
from dinoscale.errors import DataError
from tests.unit.data.conftest import jpeg, write_tar

CROPS = MultiCrop(global_size=16, local_size=8, num_local=1)


def _epoch(source: Source, *, batch_size: int = 4, workers: int = 0) -> Iterator[Batch]:
    """Every image once."""
    assert len(source) % batch_size == 0
    return train_batches(
        source,
        CROPS,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        seed=0,
        rank=0,
        world_size=1,
        start_step=0,
        stop_step=len(source) // batch_size,
        num_workers=workers,
    )


def _manifest(image_sets: Path) -> list[tuple[Path, bool]]:
    """Odd files, and whether the manifest predicts that they load."""
    folder = image_sets / "odd-images"
    with (folder / "manifest.tsv").open(encoding="utf-8") as file:
        names = [row["file"] for row in csv.DictReader(file, delimiter="\t", quoting=3)]
    return [(folder / name, name.startswith("loads/")) for name in names]


def _as_folder(files: list[Path], root: Path) -> tuple[str, list[str]]:
    for file in files:
        (root / file.name.lstrip("._")).symlink_to(file)  # else one is junk by its name
    return str(root), [str(root / file.name.lstrip("._")) for file in files]


def _as_shards(files: list[Path], root: Path) -> tuple[str, list[str]]:
    paths = []
    for first in range(0, len(files), 30):
        shard = root / f"{first:03}.tar"
        with tarfile.open(shard, "w") as tar:
            for number, file in enumerate(files[first : first + 30]):
                tar.add(file, f"{number:02}.img")  # any picture
                paths.append(f"{shard}::{number:02}.img")
    return str(root), paths


@pytest.mark.parametrize("pack", [_as_folder, _as_shards])
def test_odd_files_load_or_are_counted_as_the_manifest_predicts(
    image_sets: Path, tmp_path: Path, pack: type
) -> None:
    rows = _manifest(image_sets)
    spec, paths = pack([file for file, _ in rows], tmp_path)
    source = open_source(spec)
    assert {source.path(i) for i in range(len(source))} == set(paths)
    batches = list(_epoch(source))
    assert sorted(i for batch in batches for i in batch.sample_ids.tolist()) == list(range(100))
    bad = {sample.path for batch in batches for sample in batch.bad}
    assert bad == {path for path, (_, loads) in zip(paths, rows, strict=True) if not loads}
    assert len(bad) == 25


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("BROKEN-cut-in-the-middle.tar", "is damaged or cut off: .* ends beyond its 37164 bytes"),
        ("BROKEN-html-not-a-tar.tar", "is a web page, not a tar; its download failed"),
        ("BROKEN-zero-bytes.tar", r"is empty \(0 bytes\)"),
        ("gzip.tar.gz", r"is compressed \(gzip\).*gunzip"),
        ("no-samples.tar", "no images in .*A sample needs a member with an image extension"),
    ],
)
def test_useless_shard_is_refused_by_name(image_sets: Path, shard: str, message: str) -> None:
    path = str(image_sets / "odd-images" / "shards" / shard)
    with pytest.raises(DataError, match=message) as caught:
        open_source(path)
    assert path in str(caught.value)


def test_shard_without_end_blocks_is_read_with_a_warning(
    image_sets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = image_sets / "odd-images" / "shards" / "BROKEN-no-end-blocks.tar"
    with caplog.at_level(logging.WARNING):
        source = open_source(str(path))
    assert "no end mark" in caplog.text
    with tarfile.open(path) as tar:
        assert len(source) == sum(name.endswith(".jpg") for name in tar.getnames()) > 0
    assert not [sample for batch in _epoch(source, batch_size=1) for sample in batch.bad]


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_go_while_training_are_replaced_and_counted(
    tmp_path: Path, workers: int
) -> None:
    for i in range(200):
        (tmp_path / f"{i:03}.jpg").write_bytes(jpeg(i % 7))
    lost = [tmp_path / f"{i:03}.jpg" for i in range(40)]
    batches = _epoch(open_source(str(tmp_path)), workers=workers)
    first = next(batches)
    for path in lost[:20]:
        path.unlink()
    os.mkfifo(lost[0])  # nobody writes to it
    for path in lost[20:]:
        path.write_bytes(b"no picture any more")
    rest = list(batches)
    drawn = [int(i) for batch in [first, *rest] for i in batch.sample_ids]
    assert sorted(drawn) == list(range(200))  # an epoch as long as ever
    bad = {sample.path: sample.error for batch in rest for sample in batch.bad}
    assert set(bad) <= {*map(str, lost)}
    assert len(bad) >= 40 - 4 - workers * 2 * 4  # all but those read before, some of them ahead
    assert all(error.startswith(("cannot be read", "not an image")) for error in bad.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [("shorter", "has become shorter since it was indexed"), ("other", "has changed since")],
)
def test_shard_that_changes_while_training_is_replaced_and_counted(
    tmp_path: Path, change: str, message: str
) -> None:
    for i in range(4):
        members = {f"{j}.jpg": jpeg(j) for j in range(i * 10, i * 10 + 10)}
        write_tar(tmp_path / f"{i}.tar", members)
    victim, of_victim = tmp_path / "2.tar", set(range(20, 30))
    batches = _epoch(open_source(str(tmp_path)))
    seen = set(next(batches).sample_ids.tolist())
    if change == "shorter":
        os.truncate(victim, 2000)
    else:
        victim.write_bytes((tmp_path / "1.tar").read_bytes())  # pictures, but not those meant
    rest = list(batches)
    assert seen | {int(i) for batch in rest for i in batch.sample_ids} == set(range(40))
    bad = {sample.sample_id: sample.error for batch in rest for sample in batch.bad}
    assert of_victim - seen <= set(bad) <= of_victim
    assert all(message in error for error in bad.values())
