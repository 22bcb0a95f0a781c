import csv
import io
import json
import logging
import math
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from data_tools.build_shards import build_shards
from data_tools.dataset_stats import dataset_stats
from data_tools.headers import Header, read_header
from data_tools.index import make_index
from data_tools.inspect_shards import inspect_shards
from data_tools.survey import sample_ids
from data_tools.synthetic import synthetic
from data_tools.verify_shards import verify_shards
from dinoscale.cli import parser
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.source import open_source
from dinoscale.data.sources.synthetic import ShapesSource
from dinoscale.errors import DataError, UnavailableError
from tests.unit.data.conftest import jpeg, picture, write_tar
from tests.unit.data_tools.conftest import Storage


@pytest.fixture
def shards(class_folder: Callable[..., Path], tmp_path: Path) -> Path:
    out = tmp_path / "shards"
    build_shards(
        str(class_folder()), out, shard_bytes=8192, max_side=None, seed=0, prefix="t", workers=1
    )
    return out


@pytest.mark.parametrize("workers", [1, 2])
def test_whole_shards_verify(shards: Path, tmp_path: Path, workers: int) -> None:
    summary = verify_shards(str(shards), out=tmp_path / "bad", workers=workers)
    assert (summary["images"], summary["bad"]) == (24, 0)
    assert summary["shards_with_checksum"] == summary["shards"] > 3
    assert (tmp_path / "bad").read_bytes() == b""


def test_damage_is_found_by_checksum_decoding_and_count(shards: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in shards.glob("*.tar"))
    flipped, cut, gone = (shards / name for name in names[:3])
    source = open_source(str(flipped))
    data = bytearray(flipped.read_bytes())
    at = data.index(source.data(1))
    data[at : at + 200] = bytes(200)
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:700])
    gone.unlink()
    summary = verify_shards(str(shards), out=tmp_path / "bad", workers=2)
    bad = [json.loads(line) for line in (tmp_path / "bad").read_text().splitlines()]
    reasons = Counter(Path(entry["path"].partition("::")[0]).name for entry in bad)
    assert reasons == {flipped.name: 2, cut.name: 2, gone.name: 1}
    assert summary["bad"] == 5
    assert f"{flipped}::000000001.jpg" in [entry["path"] for entry in bad]


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize("of", ["images", "shards"])
def test_what_cannot_be_read_is_neither_bad_nor_intact(
    tmp_path: Path, storage: Storage, of: str
) -> None:
    """The same command reads it again, and only that."""
    set_of, name = (tmp_path / of), "004.v1.jpg" if of == "images" else "t-000001.tar"
    storage.fails = {name: math.inf}
    options = ["data", "verify-shards", str(set_of), "--out", str(tmp_path / "bad"), "--workers=1"]
    arguments = parser().parse_args(options)
    with pytest.raises(SystemExit) as ended:
        arguments.run(arguments)
    assert ended.value.code == 69
    (entry,) = [json.loads(line) for line in (tmp_path / "bad").read_text().splitlines()]
    assert entry["path"].endswith(name)
    assert entry["unavailable"]
    assert "Stale file handle" in entry["reason"]
    storage.fails = {"t-000000.tar": math.inf}  # which was verified
    summary = arguments.run(arguments)
    assert (summary["bad"], summary["unavailable"]) == (0, 0)
    assert summary["images"] == 24
    assert not (tmp_path / "bad.state").exists()


@pytest.mark.parametrize(
    "tool", [dataset_stats, partial(inspect_shards, sheet=None, sheet_images=1)]
)
def test_numbers_of_half_a_set_are_refused(
    class_folder: Callable[..., Path],
    tmp_path: Path,
    storage: Storage,
    tool: Callable[..., object],
) -> None:
    folder, out = str(class_folder()), tmp_path / "s.json"
    storage.fails = {f"{i:03}.v1.jpg": math.inf for i in range(12)}
    with pytest.raises(UnavailableError, match="12 of 24 files cannot be read"):
        tool(folder, images=None, out=out, workers=1)
    assert not out.exists()
    assert sum(storage.slept) == 63  # not for each of them


def test_what_was_read_of_files_that_changed_is_read_again(
    class_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = class_folder(3), tmp_path / "s.json"

    def mean() -> list[float]:
        return list(dataset_stats(str(folder), images=None, out=out, workers=1)["mean"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_tools.journal.Journal.finish", lambda _: None)  # as if stopped before
        before = mean()
    file = folder / "class 0" / "000.v1.jpg"
    status = file.stat()
    other = next(data for data in (jpeg(i) for i in range(100, 999)) if len(data) <= status.st_size)
    file.write_bytes(other.ljust(status.st_size, b"\0"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert mean() != before
    assert "s.json.state is of other work (input.images.times): starting over" in caplog.text


def test_odd_images_give_the_counts_of_their_manifest(image_sets: Path, tmp_path: Path) -> None:
    with (image_sets / "odd-images" / "manifest.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [row for row in rows if row["file"].startswith(("loads/", "fails/"))]
    rows = [row for row in rows if "._" not in row["file"]]  # junk by its name
    rows = [row for row in rows if "12000" not in row["size"]]  # 108 megapixels take their time
    for row in rows:
        target = folder / row["file"]
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(image_sets / "odd-images" / row["file"])
    opens = {row["file"] for row in rows if row["open"] == "ok"}
    decodes = {row["file"] for row in rows if row["convert_RGB"] == "ok"}
    out = tmp_path / "out"
    summary = build_shards(
        str(folder), out, shard_bytes=2**19, max_side=None, seed=0, prefix="t", workers=2
    )
    assert summary["samples"] == len(opens)
    left_out = {entry["name"] for entry in summary["left_out_files"]}
    assert left_out == {row["file"] for row in rows} - opens
    verified = verify_shards(str(out), out=tmp_path / "bad", workers=2)
    names = [json.loads(line) for line in (out / "names.jsonl").read_text().splitlines()]
    keys = [json.loads(line)["path"].split("::")[1] for line in (tmp_path / "bad").open()]
    assert {names[int(key.partition(".")[0])] for key in keys} == opens - decodes
    assert (verified["images"], verified["bad"]) == (len(opens), len(opens - decodes))


def test_statistics_are_those_of_all_pixels(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pixels = []
    for i in range(7):
        image = picture(i, width=20 + i, height=15)
        image.save(folder / f"{i}.png")
        pixels.append(np.asarray(image, np.float64).reshape(-1, 3) / 255)
    summary = dataset_stats(str(folder), images=None, out=tmp_path / "s.json", workers=1)
    together = np.concatenate(pixels)
    np.testing.assert_allclose(summary["mean"], together.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(summary["std"], together.std(axis=0), rtol=1e-12)
    assert (summary["images"], summary["pixels"]) == (7, len(together))
    mean = ",".join(f"{value:.4f}" for value in together.mean(axis=0))
    assert summary["overrides"][0] == f"data.mean=[{mean}]"
    assert json.loads((tmp_path / "s.json").read_text()) == summary


def test_statistics_of_a_sample_leave_out_what_is_unreadable(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.jpg").write_bytes(jpeg(i) if i else b"no picture")
    summaries = [dataset_stats(str(folder), images=5, out=None, workers=w) for w in (1, 2)]
    assert summaries[0] == summaries[1]
    assert summaries[0]["images"] + summaries[0]["unreadable"] == 5
    assert dataset_stats(str(folder), images=None, out=None, workers=1)["unreadable"] == 1


def test_sample_is_fixed_distinct_and_in_order() -> None:
    ids = sample_ids(1000, wanted=50)
    np.testing.assert_array_equal(ids, sample_ids(1000, wanted=50))
    assert len(set(ids.tolist())) == 50
    assert list(ids) == sorted(ids)
    assert sample_ids(10, wanted=50).tolist() == list(range(10))
    with pytest.raises(DataError, match="--images 0"):
        sample_ids(10, wanted=0)


def test_inspection_counts_what_is_there(shards: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    found = inspect_shards(
        str(shards), images=None, sheet=sheet, sheet_images=9, out=tmp_path / "s.json", workers=1
    )
    assert (found["images"], found["looked_at"], found["unreadable_headers"]) == (24, 24, 0)
    assert found["shards"] == len(list(shards.glob("*.tar")))
    assert found["formats_and_modes"] == {"JPEG RGB": 24}
    assert found["short_side_from"] == {"16": 24}
    assert found["width"] == {"min": 40, "median": 40.0, "mean": 40.0, "max": 40}
    assert found["bytes"] == sum(len(jpeg(i)) for i in range(24))
    assert found["classes"]["images_of"] == {"0": 8, "1": 8, "2": 8}
    source = open_source(str(shards))
    with Image.open(sheet) as drawn:
        drawn.load()
        corner = np.asarray(drawn)[6 + 16 : 6 + 112, 6 : 6 + 128]  # 40 x 30, not made larger
    first = source.picture(int(sample_ids(24, wanted=9)[0])).pixels()
    shown = corner[33:63, 44:84]
    np.testing.assert_array_equal(shown, first)


def test_folder_is_inspected_by_the_names_of_its_classes(
    class_folder: Callable[..., Path],
) -> None:
    folder = class_folder(6)
    picture(0).convert("L").save(folder / "class 0" / "grey.png")
    (folder / "class 1" / "torn.jpg").write_bytes(b"x")
    found = inspect_shards(
        str(folder), images=None, sheet=None, sheet_images=64, out=None, workers=1
    )
    assert found["formats_and_modes"] == {"JPEG RGB": 6, "PNG L": 1}
    assert found["unreadable_headers"] == 1
    assert found["classes"]["images_of"] == {"class 0": 3, "class 1": 3, "class 2": 2}


def test_synthetic_set_is_written_with_classes_and_masks(tmp_path: Path) -> None:
    for workers in (1, 2):
        out = tmp_path / str(workers)
        summary = synthetic(
            out, images=20, size=16, seed=3, split="test", shard_bytes=20000, workers=workers
        )
    assert (summary["samples"], summary["shards"] > 1) == (20, True)
    drawn, written = ShapesSource(images=20, size=16, seed=3, split="test"), open_source(str(out))
    np.testing.assert_array_equal(written.labels, drawn.labels)
    for i in range(20):
        np.testing.assert_array_equal(written.picture(i).pixels(), drawn.picture(i).pixels())
        shard, member = written.path(i).split("::")
        with tarfile.open(shard) as tar:
            mask = tar.extractfile(member.replace(".png", ".mask.png"))
            assert mask is not None
            np.testing.assert_array_equal(
                np.asarray(Image.open(io.BytesIO(mask.read()))), np.asarray(drawn.mask(i))
            )
    assert [p.read_bytes() for p in sorted((tmp_path / "1").iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "2").iterdir())
    ]


def test_arrays_of_seven_channels_are_packed_measured_and_verified(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 1000, (12, 9, 7)).astype(np.uint16) for _ in range(5)]
    (tmp_path / "in").mkdir()
    for number, array in enumerate(arrays):
        np.save(tmp_path / "in" / f"{number}.npy", array)
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, arrays[0], photometric="minisblack", planarconfig="contig")
    assert read_header(tiff.getvalue(), "5.tif") == Header("TIFF", "uint16", 9, 12)
    built = build_shards(
        str(tmp_path / "in"),
        tmp_path / "out",
        shard_bytes=2**20,
        max_side=None,
        seed=0,
        prefix="train",
        workers=1,
    )
    assert (built["samples"], built["left_out"]) == (5, 0)
    decoder = Decoder(7, max_pixel_value=1000.0)
    spec = str(tmp_path / "out")
    assert verify_shards(spec, decoder, out=None, workers=1)["bad"] == 0
    assert verify_shards(spec, out=None, workers=1)["bad"] == 5  # three channels are wanted
    stats = dataset_stats(spec, decoder, images=None, out=None, workers=1)
    pixels = np.stack(arrays).reshape(-1, 7) / 1000
    np.testing.assert_allclose(stats["mean"], pixels.mean(0), atol=0.002)
    np.testing.assert_allclose(stats["std"], pixels.std(0), atol=0.002)
    assert stats["overrides"][:2] == ["data.channels=7", "data.max_pixel_value=1000"]


def test_index_is_made_before_a_training_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DINOSCALE_CACHE", str(tmp_path / "cache"))
    write_tar(tmp_path / "a.tar", {"1.left.jpg": jpeg(0), "1.right.jpg": jpeg(1)})
    made = make_index(str(tmp_path / "*.tar"), workers=1)
    (index,) = (tmp_path / "cache").glob("*.index")
    assert (made["images"], made["left_out"], made["index"]) == (1, {"same_key": 1}, str(index))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        open_source(str(tmp_path / "*.tar"))
    assert "reading the headers" not in caplog.text
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.jpg").write_bytes(jpeg(0))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert make_index(str(tmp_path / "folder"), workers=1)["index"] is None
    assert caplog.text.count("listing the files") == 1
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "a.tar").rename(tmp_path / "mixed" / "a.tar")
    mixed = make_index(str(tmp_path / "mixed"), workers=1)  # of the .tar, as training
    assert (mixed["images"], mixed["left_out"]) == (1, {"same_key": 1, "compressed": 1})
