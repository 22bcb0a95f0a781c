"""A measurement that was killed goes on: what an earlier start has found is not computed again."""

from __future__ import annotations

import io
import logging
import re
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscale import cli
from dinoscale.evaluate import finished_items
from dinoscale.evaluate.classification import transfer
from dinoscale.evaluate.dense.mask_pictures import save_mask
from dinoscale.evaluate.finished_items import FinishedItems, Form, forget
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from dinoscale.evaluate.label_free.rank import Samples, evaluate_rank
from dinoscale.evaluate.retrieval.copies import Settings as CopySettings
from dinoscale.evaluate.retrieval.copies import evaluate_made_copies
from dinoscale.evaluate.retrieval.retrieve import evaluate_retrieve
from dinoscale.runtime import logs
from tests.unit.evaluate.conftest import Colors
from tests.unit.evaluate.tiny_files import save_picture, save_weights

CPU = torch.device("cpu")
FORM = Form[str](str, str)
OF_FILES = {"input": {"data": {"number": 2}}, "command": {"size": 32}}
Interrupt = Callable[[int], None]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DINOSCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """Interrupt measurements, as by Ctrl-C, once they have kept so many results; 0 does not."""
    add = FinishedItems._add
    monkeypatch.setattr(finished_items, "AT_ONCE", 1)
    monkeypatch.setattr(transfer, "FITS_AT_ONCE", 1)

    def interrupt(times: int) -> None:
        kept = []

        def add_and_end(items: FinishedItems, results: Iterable[tuple[object, Any]]) -> None:
            add(items, results)
            kept.append(results)
            if len(kept) == times:
                raise KeyboardInterrupt

        monkeypatch.setattr(FinishedItems, "_add", add_and_end)

    return interrupt


def _start(
    fingerprint: dict[str, object] | None,
    items: Sequence[int] = range(5),
    *,
    fails_at: int | None = None,
) -> list[int]:
    """Which items a start computes."""
    computed = []

    def work(item: int) -> str:
        if item == fails_at:
            raise KeyboardInterrupt
        computed.append(item)
        return f"result {item}"

    kept = FinishedItems(fingerprint, CPU)
    try:
        found = kept.each(items, work, FORM, at_once=2)
        assert found == [f"result {item}" for item in items]
    except KeyboardInterrupt:
        pass
    return computed


def test_a_second_start_computes_what_is_missing(cache: Path) -> None:
    assert _start(OF_FILES, fails_at=4) == [0, 1, 2, 3]
    (file,) = cache.glob("finished-*.jsonl")
    with file.open("a") as lines:
        lines.write('[4, "resu')  # of a process that was killed
    assert _start(OF_FILES, fails_at=4) == []
    assert _start(OF_FILES) == [4]
    assert _start(OF_FILES) == []
    assert _start(OF_FILES, [4, 7, 1]) == [7]  # of an image that could not be read before
    others = ({**OF_FILES, "command": {"size": 48}}, None, {"input": {"data": "synthetic:shapes"}})
    assert [_start(other) for other in others] == [[0, 1, 2, 3, 4]] * 3
    assert len(list(cache.iterdir())) == 2  # of generated images nothing is kept
    forget({"made_from": OF_FILES})
    assert not file.exists()


def test_damaged_results_and_lost_files_are_computed_again(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _start(OF_FILES)
    (file,) = cache.iterdir()
    lost = Form[str](str, str, lambda number, result: (number, result) != (3, "result 3"))
    computed = []
    FinishedItems(OF_FILES, CPU).each(range(5), lambda i: str(computed.append(i)), lost)
    assert computed == [3]
    file.write_bytes(b'[0, "result 0"]\nno JSON\n[1]\n\xff\n[9, "x"]\n[-1, "x"]\n[4, "result 4"]\n')
    assert _start(OF_FILES) == [1, 2, 3]
    assert "3 damaged lines" in caplog.text
    assert _start(OF_FILES) == []


def test_reading_leaves_the_half_line_that_another_process_is_writing(cache: Path) -> None:
    _start(OF_FILES, fails_at=4)
    (file,) = cache.iterdir()
    for half in ('[4, "res', 'ult 4"]\n'):
        with file.open("a") as lines:
            lines.write(half)
        assert _start(OF_FILES, fails_at=4) == []
    assert _start(OF_FILES) == []


def test_a_full_disk_costs_only_what_it_has_not_taken(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def work(item: int) -> str:
        if item == 2:  # of the second write, a part fits
            (file,) = cache.iterdir()
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 30, limits[1]))
        if item == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return f"result {item}"

    try:
        FinishedItems(OF_FILES, CPU).each(range(5), work, FORM, at_once=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot keep results" in caplog.text
    assert _start(OF_FILES) == [3]


def test_a_file_that_cannot_be_read_or_removed_stops_nothing(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _start(OF_FILES)
    (file,) = cache.iterdir()
    file.unlink()
    file.mkdir()
    assert _start(OF_FILES) == [0, 1, 2, 3, 4]
    forget({"made_from": OF_FILES})
    assert "cannot read" in caplog.text
    assert "cannot remove" in caplog.text


def test_the_limit_counts_the_file_of_the_running_measurement(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir()
    other = cache / "finished-other.jsonl"
    other.write_bytes(bytes(40))
    monkeypatch.setattr(finished_items, "MOST_BYTES", 75)  # two results take 33 bytes
    assert _start(OF_FILES, fails_at=2) == [0, 1]
    assert other.exists()
    _start(OF_FILES)
    assert not other.exists()
    assert sum(file.stat().st_size for file in cache.iterdir()) <= 75
    assert "above the limit" in caplog.text


OF_TASK = {
    "discover": "{0}/images --masks {0}/masks --indexed --size 16 --out {1} --untrained",
    "correspond": "--images {0}/images --warp --size 32 --out {1} --untrained",
    "video": "{0}/videos --size 64 --out {1} --untrained",
    "transfer": "--sets {0}/classes/a {0}/classes/b --shots 1 --seeds 1 --c 1 --num-workers 0"
    " --untrained",
}


def _measure(task: str, place: Path, out: Path, *more: str) -> None:
    words = OF_TASK[task].format(place, out).split()
    cli.run(["evaluate", task, f"{place}/w.safetensors", *words, *more])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, two images with masks, two videos of three frames, and two sets of two classes."""
    root = tmp_path_factory.mktemp("place")
    save_weights(root / "w.safetensors")
    mask = np.zeros((48, 40), np.uint8)
    mask[10:30, 8:24] = 1
    (root / "masks").mkdir()
    for i in range(2):
        save_picture(root / "images" / f"{i}.png", seed=i, size=(41, 49))  # halves of pixels
        Image.fromarray(mask).resize((41, 49), 0).save(root / "masks" / f"{i}.png")
        for number in range(8):
            of_class = root / "classes" / "ab"[i] / str(number % 2)
            save_picture(of_class / f"{number}.png", seed=8 * i + number)
        for frame in range(3):
            save_picture(root / "videos" / "ab"[i] / f"{frame:05d}.png", seed=frame)
            Image.fromarray(mask).save(root / "videos" / "ab"[i] / f"{frame:05d}.mask.png")
    return root


@pytest.mark.parametrize("task", OF_TASK)
def test_an_interrupted_task_goes_on_to_the_same_report(
    task: str,
    place: Path,
    cache: Path,
    interrupt_after: Interrupt,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"

    def found() -> tuple[str, dict[str, str]]:
        return capsys.readouterr().out, {
            path.name: path.read_text() for path in out.rglob("*.json")
        }

    _measure(task, place, out)
    whole = found()
    interrupt_after(1)
    with pytest.raises(KeyboardInterrupt):
        _measure(task, place, out)
    interrupt_after(0)
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as closed:
        lost = io.StringIO()
        lost.close()
        closed.setattr(sys, "stdout", logs._Lossy(lost, waits=True))
        _measure(task, place, out)
    assert re.search(r"1 of \d results are those of an earlier start", caplog.text)
    caplog.clear()
    _measure(task, place, out)  # all results are kept, as no report had them
    assert found() == whole
    assert re.search(r"(\d) of \1 results are those of an earlier start", caplog.text)
    assert not list(cache.glob("finished-*"))  # reported, so that another command measures anew


@pytest.mark.usefixtures("cache")
def test_no_cache_keeps_no_regressions(place: Path, interrupt_after: Interrupt) -> None:
    interrupt_after(1)
    try:
        _measure("transfer", place, place, "--no-cache")
    except KeyboardInterrupt:
        pytest.fail("a regression was kept")


@pytest.mark.usefixtures("cache")
def test_videos_of_another_start_count_only_with_the_files_that_it_wrote(
    place: Path, interrupt_after: Interrupt, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def written() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in out.rglob("*.[pgj]*")}

    interrupt_after(2)
    with pytest.raises(KeyboardInterrupt):
        _measure("video", place, out)
    interrupt_after(0)
    whole = written()
    assert len(whole) == 2 * (3 + 2)
    save_mask(np.zeros((48, 40), np.uint8), out / "a" / "00001.png")  # as of another network
    (out / "b" / "00001.png").unlink()
    _measure("video", place, out)
    assert written() == whole


def _rank(colors: Colors, options: ExtractionOptions) -> dict[str, Any]:
    samples = Samples(images=9, lidar_images=4, views=2)
    return evaluate_rank(colors.weights, colors.train, samples=samples, options=options)


def _retrieve(colors: Colors, options: ExtractionOptions) -> dict[str, Any]:
    return evaluate_retrieve(colors.weights, colors.test, multi_scale=True, options=options)


def _copies(colors: Colors, options: ExtractionOptions) -> dict[str, Any]:
    how = {"settings": CopySettings(size=16), "options": options}
    return evaluate_made_copies(colors.weights, colors.test, queries=2, **how)


@pytest.mark.parametrize(("measure", "sets"), [(_rank, 2), (_retrieve, 1), (_copies, 7)])
def test_features_are_extracted_once(
    measure: Callable[..., dict[str, Any]],
    sets: int,
    colors: Colors,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = ExtractionOptions(num_workers=0, device="cpu", progress=False)
    with caplog.at_level(logging.INFO):
        first = measure(colors, options)
        assert caplog.text.count("features cached in") == sets == len(list(cache.iterdir()))
        assert measure(colors, options) == first
    assert caplog.text.count("features read from cache") == sets
