"""A folder of stored targets, made by hand: its manifest is checked, and its files are read."""

import copy
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dinoscale.config import RunConfig, parse_config, phases_of
from dinoscale.data.sources.synthetic import parse_synthetic
from dinoscale.errors import ConfigError, DataError, UnavailableError
from dinoscale.runtime.launcher_env import read_process
from dinoscale.runtime.outputs import sha256
from dinoscale.training.phases import require_teachers
from dinoscale.training.targets import read
from dinoscale.training.targets.folder import TargetFolder, open_targets
from dinoscale.training.targets.manifest import require_whole
from dinoscale.training.targets.read import TargetReader
from dinoscale.training.targets.settings import crop_sums, known_settings
from dinoscale.training.targets.stripes import FORMAT, Stored, stored_of
from tests.distributed.tiny_run import tiny_config, tiny_plan

STEPS, SHARD_STEPS, IMAGES, OF_SLOT = 3, 2, 4, 2
CROPS = torch.arange(2 * 8 * 8 * 3, dtype=torch.uint8).view(2, 1, 8, 8, 3)
PARAMS: Any = np.zeros((2, 1), dtype=[("flip", "?")])


def _config(folder: Path) -> RunConfig:
    return tiny_config(
        train={"batch_size": IMAGES, "micro_batch_size": 1, "stop_after_steps": STEPS},
        distill={"targets": str(folder), "class_feature_weight": 1.0},
    )


def _stored(step: int, slot: int) -> Stored:
    """Of images whose crops are all alike; their classes say which they are."""
    images = torch.arange(slot * OF_SLOT, (slot + 1) * OF_SLOT)
    classes = (10.0 * step + images).view(1, OF_SLOT, 1).expand(2, OF_SLOT, 3)
    return Stored(images, crop_sums(CROPS, PARAMS).expand(OF_SLOT).clone(), classes.contiguous())


@pytest.fixture
def folder(tmp_path: Path) -> TargetFolder:
    """Of two slots of each step."""
    shards = []
    for first in range(0, STEPS, SHARD_STEPS):
        stop, arrays = min(first + SHARD_STEPS, STEPS), {}
        for slot in range(IMAGES // OF_SLOT):
            path = tmp_path / f"{first}-{slot}.safetensors"
            found: dict[str, torch.Tensor] = {}
            for step in range(first, stop):
                found |= _stored(step, slot).named(step)
            save_file(found, path)
            about = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
            arrays[str(slot)] = about
        shards.append({"first": first, "stop": stop, "arrays": arrays, "unreadable": []})
    manifest = {
        "format": FORMAT,
        "teacher": {"identity": "0", "licence": None},
        "prototypes": {"file": "prototypes.safetensors", "bytes": 1, "sha256": "0"},
        "settings": {
            "run": {"data": {}, "train": {"batch_size": IMAGES}},
            "outputs": {"of": "heads", "patches": False, "width": None},
            "steps": STEPS,
            "shard_steps": SHARD_STEPS,
            "train": {"micro_batch_size": OF_SLOT},
        },
        "unreadable": [],
        "shards": shards,
    }
    require_whole(manifest)
    return TargetFolder(tmp_path, manifest)


@pytest.fixture
def reader(folder: TargetFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[TargetReader]:
    """Of the folder, where a retry waits for nothing; its thread ends before that does."""
    monkeypatch.setattr("dinoscale.runtime.retry.time.sleep", lambda _s: None)
    config = _config(folder.path)
    reader = TargetReader(folder, config, tiny_plan(config), read_process({}))
    yield reader
    reader.close()
    _join(_threads())


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("targets")]


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def _read(reader: TargetReader, step: int, index: int, crops: torch.Tensor = CROPS) -> list[float]:
    ids = torch.tensor([index])
    batch: Any = SimpleNamespace(sample_ids=ids, global_crops=crops, params=PARAMS, bad=[])
    return reader.of(step, index, batch, None).classes[:, 0].tolist()


def test_small_micro_batches_read_a_slot_once(
    reader: TargetReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def counted(tensors: dict[str, torch.Tensor], step: int, *, patches: bool) -> Stored:
        asked.append(step)
        return stored_of(tensors, step, patches=patches)

    monkeypatch.setattr(read, "stored_of", counted)
    for step in range(STEPS):
        for index in range(IMAGES):
            assert _read(reader, step, index) == 2 * [10.0 * step + index]
    assert asked == [0, 0, 1, 1, 2, 2]


def test_a_file_that_is_cut_off_behind_its_checksum_has_been_read(
    reader: TargetReader, folder: TargetFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(tensors: dict[str, torch.Tensor], step: int, *, patches: bool) -> Stored:
        os.truncate(folder.path / "0-0.safetensors", 64)
        return stored_of(tensors, step, patches=patches)

    monkeypatch.setattr(read, "stored_of", cut)
    assert _read(reader, 0, 1) == [1.0, 1.0]


@pytest.mark.parametrize("view", [0, 1])
def test_one_pixel_of_another_image_is_noticed(reader: TargetReader, view: int) -> None:
    pixels = CROPS.clone()
    pixels[view, 0, -1, -1, -1] += 1
    with pytest.raises(DataError, match=r"^distill.targets: the crops of step 0 are others"):
        _read(reader, 0, 1, pixels)


def test_nothing_is_read_once_a_reader_is_closed(reader: TargetReader) -> None:
    _read(reader, 0, 0)
    (thread,) = _threads()
    reader.close()
    _join([thread])


def _failing(times: int, then: Callable[..., Any]) -> Callable[..., Any]:
    """Fails so often as a file server that is restarted does."""
    left = iter(range(times))

    def call(*arguments: Any) -> Any:
        if next(left, None) is not None:
            raise OSError(errno.ESTALE, "Stale file handle")
        return then(*arguments)

    return call


@pytest.mark.parametrize("times", [2, 99])
def test_a_file_system_that_fails_for_a_moment_ends_no_run(
    reader: TargetReader, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(Path, "read_bytes", _failing(times, Path.read_bytes))
    if times == 2:
        assert _read(reader, 0, 1) == [1.0, 1.0]
        return
    says = (
        r"^distill.targets: .* cannot be read now \(Stale .*intact: repair the file system, then s"
    )
    with pytest.raises(UnavailableError, match=says) as raised:
        _read(reader, 0, 1)
    assert "compute" not in str(raised.value)


def test_a_manifest_that_cannot_be_read_now_may_be_intact(
    folder: TargetFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoscale.runtime.retry.time.sleep", lambda _s: None)
    monkeypatch.setattr(Path, "read_bytes", _failing(99, Path.read_bytes))
    with pytest.raises(UnavailableError, match=r"manifest.json cannot be read now"):
        _open(folder)


def _open(folder: TargetFolder) -> None:
    config, source = _config(folder.path), parse_synthetic("synthetic:shapes?images=4")
    open_targets(config, tiny_plan(config), source, source.identity())


@pytest.mark.parametrize("own", [True, False])
def test_targets_of_a_phase_to_come_are_compared_with_its_settings(
    folder: TargetFolder, own: bool
) -> None:
    config = _config(folder.path)
    (folder.path / "first.pth").touch()
    first = {"distill": {"targets": None, "teacher": f"{folder.path}/first.pth"}}
    phases = [{"name": "first", "change": first}, {"name": "second"}]
    plain = config.model_copy(update={"run_dir": f"{folder.path}/run"}).model_dump()
    config = parse_config(plain | {"phases": phases})
    runs = phases_of(config)
    width = runs[1].of_teacher.model.width
    settings = folder.manifest["settings"]
    settings["outputs"] = {"of": "features", "patches": False, "width": width}
    settings["run"] = known_settings(runs[1]) | ({} if own else {"seed": runs[0].seed})
    (folder.path / "manifest.json").write_text(json.dumps(folder.manifest))
    if own:
        require_teachers(config, runs)
        return
    says = r"^phases.second.distill.targets: .* of another run: seed is \d+ there and \d+ now. Rest"
    with pytest.raises(ConfigError, match=says):
        require_teachers(config, runs)


def _entry(manifest: Any) -> Any:
    return manifest["shards"][1]["arrays"]["1"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(prototypes=None), "TypeError"),
        (lambda m: m["teacher"].pop("licence"), "'licence'"),
        (lambda m: m.update(shards=[]), "the number of shards cannot be right"),
        (lambda m: m["shards"].pop(), "the number of shards cannot be right"),
        (lambda m: m["shards"][1]["arrays"].pop("1"), "the slots of the shard of the steps 2..2 c"),
        (lambda m: m["settings"].update(shard_steps=0), "settings.shard_steps cannot be right"),
        (lambda m: m["settings"].update(steps="3"), "settings.steps cannot be right"),
        (lambda m: m["shards"][1].update(first=1), "the shard of the steps 2..2 cannot be right"),
        (lambda m: m["shards"][0].update(stop=1), "the shard of the steps 0..1 cannot be right"),
        (lambda m: _entry(m).update(file="../a"), "'../a', the file of slot 1 of the .* is not in"),
        (lambda m: _entry(m).update(file=".."), "'..', the file of slot 1 of the .* is not in"),
        (lambda m: m["prototypes"].update(file="/a"), "'/a', the file of prototypes, is not in"),
        (lambda m: _entry(m).pop("sha256"), "'sha256'"),
        (lambda m: m["shards"][1]["unreadable"].append({"number": -1}), "unreadable of the shard"),
    ],
)
def test_a_manifest_that_says_too_little_is_refused(
    folder: TargetFolder, change: Callable[[Any], object], says: str
) -> None:
    manifest = copy.deepcopy(folder.manifest)
    change(manifest)
    (folder.path / "manifest.json").write_text(json.dumps(manifest))
    says = rf"^distill.targets: .*manifest.json is not as it was written \(.*{says}"
    with pytest.raises(DataError, match=says) as raised:
        _open(folder)
    assert raised.value.exit_code == 2
