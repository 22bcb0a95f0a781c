"""What goes wrong while the outputs of a frozen teacher are stored, and what is written then."""

import itertools
import json
import os
import re
import resource
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from dinoscale.cluster.doctor import marker
from dinoscale.config import RunConfig
from dinoscale.config.resolve import resolve
from dinoscale.engine.build import InitialWeights, shapes_only
from dinoscale.errors import DataError, LaunchError, OutputError, UnavailableError
from dinoscale.evaluate.embedding.folder import FeatureFolder
from dinoscale.runtime.launcher_env import read_process
from dinoscale.runtime.watchdog import Watchdog
from dinoscale.training.feed import finish_batch, open_images
from dinoscale.training.targets import write
from dinoscale.training.targets.folder import open_targets
from tests.distributed.tiny_run import dinov2, tiny_config
from tests.harness import RankFailedError, run_distributed

IMAGES, STEPS, SHARD_STEPS = 8, 3, 2
SHAPES = f"synthetic:shapes?images={IMAGES}&size=40"


def _config(*, stage: int = 0, data: dict[str, Any] | None = None) -> RunConfig:
    """A student of a teacher like itself."""
    sections = dinov2("sinkhorn_knopp", patch_head=True, koleo={"loss_weight": 0.0})
    train = {"batch_size": 4, "micro_batch_size": 1, "epochs": 2, "stop_after_steps": STEPS}
    return tiny_config(
        **sections,
        train=train,
        data={"train": SHAPES, "num_workers": 0} | (data or {}),
        distill={"teacher": "weights"},
        engine={"zero_stage": stage, "precision": "fp32"},
    )


def _random_teacher(config: RunConfig, *_: Any) -> InitialWeights:
    """In place of weights that are read."""
    generator = torch.Generator().manual_seed(1)
    parts: dict[str, dict[str, torch.Tensor]] = {"backbone": {}, "head": {}, "patch_head": {}}
    for name, value in shapes_only(config.of_teacher).state_dict().items():
        part, _, key = name.partition(".")
        parts[part][key] = torch.randn(value.shape, generator=generator)
    return InitialWeights(**parts, identity=64 * "1")


def fail_on_one_rank(out: str) -> None:
    """Rank 1 loses the images of its second forward, which is collective."""
    process, finish, forwards = read_process(os.environ), write.finish_batch, 0

    def fail(*arguments: Any, **options: Any) -> Any:
        nonlocal forwards
        forwards += 1
        if process.rank == 1 and forwards == 2:
            raise DataError("the disk of the images is gone")
        return finish(*arguments, **options)

    write.read_frozen_teacher, write.finish_batch = _random_teacher, fail
    watchdog = Watchdog(timeout_s=600, hosts=["a", "b"], launched=False, ask_to_stop=print)
    with watchdog.sharing_failure():
        write.write_targets(_config(stage=3), process, out)


@pytest.mark.distributed
def test_an_error_of_one_rank_within_a_shard_ends_all_of_stage_3(tmp_path: Path) -> None:
    function = f"{__name__}:fail_on_one_rank"
    with pytest.raises(RankFailedError, match="the disk of the images is gone"):
        run_distributed(function, world_size=2, timeout_s=60, out=str(tmp_path / "targets"))


def on_two_nodes(root: str) -> dict[str, str]:
    """What is raised where two nodes differ, by what differs."""
    process, found = read_process(os.environ), {}
    write.read_frozen_teacher = _random_teacher
    own = Path(root) / str(process.rank)
    own.mkdir()
    older = patch("dinoscale.runtime.versions.version", lambda _: f"9.{process.rank}")
    soon = patch.object(marker, "_SEEN_WITHIN_S", 1.0)
    for name, odd in (("versions", older), ("folder", soon)):
        with odd, pytest.raises(LaunchError) as raised:
            write.write_targets(_config(), process, own, shard_steps=SHARD_STEPS)
        found[name] = str(raised.value)
    return found


@pytest.mark.distributed
def test_nodes_with_other_software_or_another_folder_are_refused(tmp_path: Path) -> None:
    function = f"{__name__}:on_two_nodes"
    for found in run_distributed(function, world_size=2, timeout_s=60, root=str(tmp_path)):
        assert re.search(r"torch is 9.0 on rank 0 .* but 9.1 on rank 1", found["versions"])
        says = r"^OUT: rank 1 .* cannot see in .*/1 what rank 0 .* wrote to .*/0; put OUT on a file"
        assert re.search(says, found["folder"])


@pytest.fixture
def write_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Store the targets of a configuration, in this process; the summary."""
    monkeypatch.setattr(write, "read_frozen_teacher", _random_teacher)
    return lambda config: write.write_targets(
        config, read_process({}), tmp_path / "targets", shard_steps=SHARD_STEPS
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 8 images, of which one cannot be read."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(IMAGES):
        color = (30 * number, 90, 200 - 20 * number)
        Image.new("RGB", (40, 40), color).save(folder / f"{number}.png")
    cut = folder / "3.png"
    cut.write_bytes(bytes(reversed(cut.read_bytes())))  # the same size, thus the same set
    return folder


def _open(config: RunConfig, folder: Path) -> None:
    """What the start of a student asks of its targets."""
    distill = config.distill.model_copy(update={"teacher": None, "targets": str(folder)})
    source = open_images(config)
    plan = resolve(config, world_size=1, num_images=len(source))
    student = config.model_copy(update={"distill": distill})
    assert open_targets(student, plan, source, source.identity()) is not None


def test_unreadable_images_are_listed_and_told_of(
    write_here: Any, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(data={"train": str(pictures), "max_bad_fraction": 0.5})
    assert write_here(config)["unreadable"] == 1
    manifest = json.loads((tmp_path / "targets" / "manifest.json").read_text())
    (listed,) = manifest["unreadable"]
    assert (listed["number"], Path(listed["path"]).name) == (3, "3.png")
    met = [bad for record in manifest["shards"] for bad in record["unreadable"]]
    assert listed["times"] == sum(bad["times"] for bad in met) >= 1
    assert "1 unreadable images were replaced by others" in caplog.text
    assert f"{pictures}/3.png" in (tmp_path / "targets" / "bad_samples.jsonl").read_text()
    _open(config, tmp_path / "targets")
    repaired = pictures / "3.png"
    repaired.write_bytes(bytes(reversed(repaired.read_bytes())))
    says = r"^distill.targets: .*3.png could not be read .* can be read now; remove (\S*) .*start"
    with pytest.raises(DataError, match=says) as refused:
        _open(config, tmp_path / "targets")
    named = re.match(says, str(refused.value))
    assert named is not None
    for file in tmp_path.glob(str(Path(named[1]).relative_to(tmp_path))):
        file.unlink()
    assert write_here(config)["unreadable"] == 0
    _open(config, tmp_path / "targets")


def test_no_image_is_replaced_that_may_be_intact(
    write_here: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_one(*arguments: Any) -> Any:
        source = open_images(*arguments)
        (pictures / "2.png").unlink()
        return source

    monkeypatch.setattr(write, "open_images", lose_one)
    says = r"2.png: cannot be read: No such file .* may be intact: make it readable first"
    with pytest.raises(UnavailableError, match=says):
        write_here(_config(data={"train": str(pictures), "max_bad_fraction": 0.5}))
    assert not (tmp_path / "targets" / "manifest.json").exists()


def test_too_many_unreadable_images_stop_it_as_they_stop_a_run(
    write_here: Any, pictures: Path, tmp_path: Path
) -> None:
    says = r"^too many unreadable images: .* than data.max_bad_fraction=0 allows:\n .*3.png: "
    with pytest.raises(DataError, match=says):
        write_here(_config(data={"train": str(pictures), "max_bad_fraction": 0.0}))
    assert not (tmp_path / "targets" / "manifest.json").exists()


def test_the_weights_are_not_kept_beside_the_teacher(
    write_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[weakref.ref[InitialWeights]] = []

    def read(config: RunConfig, *_: Any) -> InitialWeights:
        weights = _random_teacher(config)
        kept.append(weakref.ref(weights))
        return weights

    def finish(*arguments: Any, **options: Any) -> Any:
        assert kept[0]() is None
        return finish_batch(*arguments, **options)

    monkeypatch.setattr(write, "read_frozen_teacher", read)
    monkeypatch.setattr(write, "finish_batch", finish)
    write_here(_config())
    assert kept


@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_damaged_prototypes_are_written_anew(write_here: Any, tmp_path: Path, damage: str) -> None:
    write_here(_config())
    file, manifest = (tmp_path / "targets" / name for name in (write.PROTOTYPES, write.MANIFEST))
    before, listed = file.read_bytes(), manifest.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(before[:-1] + (b"" if damage == "short" else bytes([before[-1] ^ 1])))
    assert write_here(_config())["new_shards"] == 0
    assert file.read_bytes() == before
    assert manifest.read_bytes() == listed


def test_a_disk_with_too_little_space_is_refused(
    write_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = resolve(_config(), world_size=1, num_images=IMAGES)
    needed = plan.batch_size * STEPS * write.bytes_of_image(_config(), plan)
    space = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: space)
    with pytest.raises(OutputError, match=r"targets take about .* GB, and .* choose another disk"):
        write_here(_config())
    space.free = needed
    assert write_here(_config())["new_shards"] == 2


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [(write, "write_tensors", 1), (write, "write_tensors", 2), (FeatureFolder, "add", 1)],
    ids=["prototypes", "stripe", "record"],
)
def test_a_full_disk_is_said_in_a_sentence(
    write_here: Any,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    number: int,
) -> None:
    calls, real = itertools.count(1), getattr(owner, name)

    def on_a_full_disk(*arguments: Any) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if next(calls) == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # bytes of a file
        try:
            real(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(owner, name, on_a_full_disk)
    with pytest.raises(OutputError, match=r"^cannot write to .*/targets.*: .*File too large"):
        write_here(_config())
    monkeypatch.undo()
    monkeypatch.setattr(write, "read_frozen_teacher", _random_teacher)
    assert write_here(_config())["steps"] == STEPS
